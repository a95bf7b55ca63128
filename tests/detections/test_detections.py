"""Detections: indexing, conversion, drawing and saving."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import forget_the_peak, resident
from hotcoco import mask as coco_mask
from PIL import Image

from vitadapter_zoo import Detections, ZooError
from vitadapter_zoo.catalog import COCO_CATEGORY_IDS, COCO_CLASSES
from vitadapter_zoo.detections import Instances
from vitadapter_zoo.detections.drawing import instance_colors


def sample() -> Detections:
    masks = torch.zeros(3, 20, 30, dtype=torch.bool)
    masks[0, 2:8, 3:9] = True
    masks[1, 10:, 20:] = True
    return Detections(
        boxes=torch.tensor([[3.0, 2.0, 9.0, 8.0], [20.0, 10.0, 30.0, 20.0], [5.0, 5.0, 5.2, 5.2]]),
        scores=torch.tensor([0.9, 0.5, 0.1]),
        labels=torch.tensor([0, 79, 11]),
        masks=masks,
    )


def test_length_names_and_filter() -> None:
    found = sample()
    assert len(found) == 3
    assert found.class_names == ["person", "toothbrush", "stop sign"]
    kept = found.filter(0.5)
    assert kept.class_names == ["person", "toothbrush"]
    assert kept.masks.shape == (2, 20, 30)
    assert len(found.filter(1.0)) == 0


def test_to_coco_has_coco_ids_boxes_and_rles() -> None:
    found = sample()
    results = json.loads(json.dumps(found.to_coco(42)))
    assert [result["category_id"] for result in results] == [1, 90, 13]
    assert results[1]["bbox"] == [20, 10, 10, 10]
    assert {result["image_id"] for result in results} == {42}
    for result, mask in zip(results, found.masks, strict=True):
        assert result["segmentation"]["size"] == [20, 30]
        np.testing.assert_array_equal(coco_mask.decode(result["segmentation"]), mask.numpy())
    assert found.filter(1).to_coco(1) == []


def test_coco_ids_leave_out_the_ten_unused() -> None:
    assert len(COCO_CLASSES) == len(COCO_CATEGORY_IDS) == 80
    unused = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    assert set(COCO_CATEGORY_IDS) == set(range(1, 91)) - unused
    assert list(COCO_CATEGORY_IDS) == sorted(COCO_CATEGORY_IDS)


def test_draw_changes_the_objects_and_nothing_else() -> None:
    picture = Image.new("RGB", (30, 20), (10, 20, 30))
    drawn = np.asarray(sample().filter(0.9).draw(picture))
    assert drawn.shape == (20, 30, 3)
    assert (drawn[5, 6] != (10, 20, 30)).any()
    assert (drawn[19, 29] == (10, 20, 30)).all()
    np.testing.assert_array_equal(np.asarray(sample().filter(1).draw(picture)), np.asarray(picture))
    sample().draw(picture)  # the third box has no whole pixel


def test_draw_refuses_another_image() -> None:
    with pytest.raises(ZooError, match="31 x 20 pixels, the detections belong to one of 30 x 20"):
        sample().draw(Image.new("RGB", (31, 20)))


def large(count: int, size: tuple[int, int]) -> Detections:
    """Make network output: random boxes and masks in an image of that size."""
    generator = torch.Generator().manual_seed(0)
    height, width = size
    extent = torch.tensor([width, height])
    centres = torch.rand(count, 2, generator=generator) * extent
    sides = (0.05 + 0.6 * torch.rand(count, 2, generator=generator)) * extent
    boxes = torch.cat([centres - sides / 2, centres + sides / 2], dim=1)
    boxes = boxes.clamp(min=0).minimum(extent.repeat(2))
    return Detections.of(
        Instances(
            boxes=boxes,
            scores=torch.linspace(0.99, 0.2, count),
            labels=torch.arange(count) % 80,
            mask_probabilities=torch.rand(count, 28, 28, generator=generator),
            size=size,
        ),
        COCO_CLASSES,
    )


def test_indexing_and_iteration_give_detections() -> None:
    found = sample()
    singles: tuple[Any, ...] = (1, -2, np.int64(1), torch.tensor(1))
    for single in singles:
        one = found[single]
        assert one.class_names == ["toothbrush"]
        assert torch.equal(one.masks, found.masks[1:2])
    for index in (
        slice(0, 2),
        found.scores > 0.3,
        (found.scores > 0.3).numpy(),
        [True, True, False],
        [0, 1],
        np.array([0, -2]),
    ):
        kept = found[index]
        assert kept.class_names == ["person", "toothbrush"]
        assert torch.equal(kept.boxes, found.boxes[:2])
        assert torch.equal(kept.masks, found.masks[:2])
    assert [len(one) for one in found] == [1, 1, 1]
    assert [name for one in found for name in one.class_names] == found.class_names
    assert len(found[[]]) == len(found[5:]) == 0
    assert found[[]].masks.shape == (0, 20, 30)
    assert found[::-1].class_names == found.class_names[::-1]
    with pytest.raises(IndexError, match="3 detections, none has the index 3"):
        found[3]
    for wrong in (torch.tensor([True, False]), torch.tensor([True]), np.ones((3, 1), bool)):
        with pytest.raises(IndexError, match="one bool for each of the 3 detections"):
            found[wrong]
    for odd in ("dog", 0.5):
        with pytest.raises(TypeError, match=r"not '(dog|0\.5)'; with_classes chooses by name"):
            found[odd]  # type: ignore[index]


def test_a_mask_for_a_single_detection_is_a_mask() -> None:
    # A tensor with one bool converts to an integer, so it could pass for the index 0 or 1.
    one = sample()[1]
    assert len(one) == 1
    for empty in (one.scores > 1, (one.scores > 1).numpy(), [False]):
        assert len(one[empty]) == 0
    for full in (one.scores >= 0, (one.scores >= 0).numpy(), [True], torch.tensor([0]), [0]):
        assert one[full].class_names == ["toothbrush"]
    assert len(one.filter(0.99)) == 0
    assert len(one.filter(0)) == 1
    assert len(one.with_classes("person")) == 0
    assert len(one.with_classes("toothbrush")) == 1
    assert len(one[:0][one.scores[:0] > 0.5]) == 0


def test_indexing_before_and_after_the_masks_are_made_is_the_same() -> None:
    fresh, used = large(20, (90, 120)), large(20, (90, 120))
    assert used.masks.shape == (20, 90, 120)
    for index in (3, slice(None, None, 4), used.scores < 0.5):
        assert torch.equal(fresh[index].masks, used[index].masks)
        assert fresh[index].run_lengths() == used[index].run_lengths()
        assert fresh[index].to_json() == used[index].to_json()
    used.masks[0] = False  # belongs to the detections from then on
    assert used[0].to_dataframe()["area"].tolist() == [0]


def test_with_classes() -> None:
    found = sample()
    assert found.with_classes("stop sign", "person").class_names == ["person", "stop sign"]
    assert len(found.with_classes("dog")) == 0
    with pytest.raises(ZooError, match="no class 'persn': did you mean person"):
        found.with_classes("persn")


def test_one_length() -> None:
    found = sample()
    with pytest.raises(ValueError, match="3 boxes, 2 scores, 3 labels and 3 masks"):
        Detections(found.boxes, found.scores[:2], found.labels, found.masks)


def test_coco_ids_of_other_classes() -> None:
    found = sample()
    own = Detections(
        found.boxes, found.scores, torch.tensor([0, 1, 0]), found.masks, ("cell", "gap\x1b[2J")
    )
    with pytest.raises(ZooError, match="category_ids="):
        own.to_coco(1)
    for ids in ((7, 3), {"gap\x1b[2J": 3, "cell": 7, "more": 1}):
        assert [row["category_id"] for row in own.to_coco(1, category_ids=ids)] == [7, 3, 7]
    with pytest.raises(ZooError, match="1 category_ids for 2 classes"):
        own.to_coco(1, category_ids=[4])
    with pytest.raises(ZooError, match=r"no id for the class 'gap\\x1b\[2J'"):
        own.to_coco(1, category_ids={"cell": 1})
    assert "\x1b" not in repr(own) + (own._repr_html_() or "")


def test_json_holds_everything() -> None:
    found = sample()
    content = json.loads(found.to_json())
    assert content["size"] == [20, 30]
    assert [one["name"] for one in content["detections"]] == found.class_names
    assert [one["label"] for one in content["detections"]] == found.labels.tolist()
    for one, box, mask in zip(content["detections"], found.boxes, found.masks, strict=True):
        assert torch.equal(torch.tensor(one["box"]), box)
        np.testing.assert_array_equal(coco_mask.decode(one["segmentation"]), mask.numpy())


def test_dataframe() -> None:
    table = sample().to_dataframe()
    assert table.columns.tolist() == ["name", "label", "score", "x1", "y1", "x2", "y2", "area"]
    assert table["area"].tolist() == [36, 100, 0]
    assert table.query("score > 0.3")["name"].tolist() == ["person", "toothbrush"]
    assert len(sample().filter(1).to_dataframe()) == 0


def test_supervision_and_back() -> None:
    import supervision as sv

    for found in (sample(), large(9, (60, 80)), sample().filter(1)):
        theirs = found.to_supervision()
        assert isinstance(theirs, sv.Detections)
        assert list(theirs.data["class_name"]) == found.class_names
        back = Detections.from_supervision(theirs)
        for name in ("boxes", "scores", "labels", "masks"):
            assert torch.equal(getattr(back, name), getattr(found, name))
        theirs.xyxy += 5
        assert torch.equal(back.boxes, found.boxes)
    confident = theirs_of(large(9, (60, 80)))
    kept = Detections.from_supervision(confident[confident.confidence > 0.5])
    assert len(kept) == int((large(9, (60, 80)).scores > 0.5).sum())
    compact = sv.CompactMask.from_dense(confident.mask, confident.xyxy, (60, 80))
    confident.mask = compact
    # It keeps what is inside of the boxes.
    assert Detections.from_supervision(confident).masks.shape == (9, 60, 80)


def theirs_of(found: Detections) -> Any:
    return found.to_supervision()


def test_supervision_without_what_detections_need() -> None:
    import supervision as sv

    boxes = np.array([[1, 2, 3, 4]], np.float32)
    with pytest.raises(ZooError, match="have no masks"):
        Detections.from_supervision(sv.Detections(boxes))
    masks = np.zeros((1, 9, 9), bool)
    with pytest.raises(ZooError, match="have no scores and class ids"):
        Detections.from_supervision(sv.Detections(boxes, mask=masks))
    odd = sv.Detections(boxes, masks, confidence=np.ones(1), class_id=np.array([80]))
    with pytest.raises(ZooError, match="class ids from 80 to 80 do not fit the 80 categories"):
        Detections.from_supervision(odd)
    named = sample().to_supervision()
    with pytest.raises(ZooError, match="the class 0 is 'person' in these detections and 'cat' in"):
        Detections.from_supervision(named, categories=("cat",) * 80)
    with pytest.raises(ZooError, match="size="):
        Detections.from_supervision(sv.Detections.empty())
    empty = Detections.from_supervision(sv.Detections.empty(), size=(20, 30))
    assert empty.masks.shape == (0, 20, 30)
    assert sample().to_supervision(masks=False).mask is None


def test_their_annotators_draw_ours() -> None:
    import supervision as sv

    scene = np.full((20, 30, 3), 100, np.uint8)
    found = sample().to_supervision()
    drawn = sv.MaskAnnotator().annotate(scene.copy(), found)
    assert (drawn[5, 6] != 100).any()
    assert (drawn[0, 0] == 100).all()
    boxed = sv.BoxAnnotator(thickness=1).annotate(scene.copy(), found)
    assert (boxed[2, 5] != 100).any()
    labelled = sv.LabelAnnotator().annotate(scene.copy(), found)
    assert (labelled != 100).any()


def test_crops() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    first, second, third = sample().crops(rgb)
    np.testing.assert_array_equal(np.asarray(first), rgb[2:8, 3:9])
    np.testing.assert_array_equal(np.asarray(second), rgb[10:20, 20:30])
    np.testing.assert_array_equal(np.asarray(third), rgb[5:6, 5:6])
    with pytest.raises(ZooError, match="do not know their image"):
        sample().crops()


def test_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    picture = tmp_path / "picture.png"
    Image.new("RGB", (30, 20)).save(picture)
    before = picture.read_bytes()
    found = sample()
    found.image = picture
    found.save("~/new/drawn.PNG")
    assert Image.open(tmp_path / "new" / "drawn.PNG").size == (30, 20)
    found.save(tmp_path / "found.json")
    assert (tmp_path / "found.json").read_text() == found.to_json()
    (tmp_path / "link.png").symlink_to(picture)
    (tmp_path / "hard.png").hardlink_to(picture)
    for name in ("picture.png", "link.png", "hard.png", "PICTURE.png", "new/../picture.png"):
        with pytest.raises(ZooError, match=r"is the input .*picture\.png, which is never replaced"):
            found.save(tmp_path / name)
    with pytest.raises(ZooError, match=r"no picture format ends in '\.txt'"):
        found.save(tmp_path / "drawn.txt")
    with pytest.raises(ZooError, match="it is a folder"):
        found.save(tmp_path)
    with pytest.raises(ZooError, match="cannot write"):
        found.save(tmp_path / "found.json" / "drawn.png")
    assert picture.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {
        "picture.png", "link.png", "hard.png", "new", "found.json",
    }  # fmt: skip


def test_repr_is_two_lines() -> None:
    assert repr(sample()) == (
        "Detections(3 in 30 x 20 pixels: 1 person, 1 toothbrush, 1 stop sign)\n"
        "  best: person 0.90 in the box (3, 2, 9, 8)"
    )
    assert len(repr(large(100, (90, 120))).splitlines()) == 2
    assert "nothing found" in repr(sample().filter(1))
    assert len(repr(sample().filter(1)).splitlines()) == 2


def test_notebooks_show_the_picture_where_it_is_known(tmp_path: Path) -> None:
    found = sample()
    assert found._repr_png_() is None
    assert found._repr_html_() is None
    found.image = Image.new("RGB", (30, 20))
    shown = Image.open(io.BytesIO(found._repr_png_() or b""))
    assert shown.size == (30, 20)
    page = found._repr_html_() or ""
    assert "toothbrush" in page
    assert "data:image/png;base64," in page
    found.categories = ("<b>", *found.categories[1:])
    assert "&lt;b&gt;" in (found._repr_html_() or "")
    found.image = tmp_path / "gone.png"
    assert found._repr_png_() is None


def test_draw_takes_alpha_labels_and_masks() -> None:
    rgb = np.full((200, 300, 3), 60, np.uint8)
    masks = torch.zeros(1, 200, 300, dtype=torch.bool)
    masks[0, 60:150, 60:200] = True
    one = Detections(
        torch.tensor([[50.0, 50, 250, 160]]), torch.tensor([0.9]), torch.tensor([0]), masks
    )
    opaque = np.asarray(one.draw(rgb, alpha=1))
    color = opaque[100, 100]
    assert (opaque[60:150, 60:200] == color).all()
    assert (rgb == 60).all()
    half = np.asarray(one.draw(rgb, alpha=0.5, labels=False))
    np.testing.assert_array_equal(half[100, 100], np.rint((color.astype(float) + 60) / 2))
    assert (half[:40] == 60).all()
    assert (opaque[:50] != 60).any()  # the label, above the box
    bare = np.asarray(one.draw(rgb, masks=False, labels=False))
    assert (bare[100, 100] == 60).all()
    assert (bare[50, 100] == color).all()
    own = np.asarray(one.draw(rgb, labels=["a much longer text of my own"]))
    assert (own[:50] != 60).sum() > (opaque[:50] != 60).sum()
    with pytest.raises(ValueError, match="2 labels for 1 detections"):
        one.draw(rgb, labels=["a", "b"])
    with pytest.raises(ValueError, match="alpha"):
        one.draw(rgb, alpha=1.5)


def test_instances_of_a_class_differ_in_shade() -> None:
    colors = instance_colors([0, 0, 1, 0, 1])
    assert len(set(colors)) == 5
    assert colors[0] == instance_colors([0])[0]


def test_text_and_lines_grow_with_the_image() -> None:
    def drawn(scale: int) -> np.ndarray[Any, Any]:
        height, width = 400 * scale, 600 * scale
        found = Detections(
            torch.tensor([[100.0, 100, 500, 300]]) * scale,
            torch.tensor([0.9]),
            torch.tensor([0]),
            torch.zeros(1, height, width, dtype=torch.bool),
        )
        picture = np.asarray(found.draw(np.zeros((height, width, 3), np.uint8)))
        return np.asarray((picture > 0).any(axis=2))

    small, big = drawn(2), drawn(8)
    line = [int(picture[:, picture.shape[1] // 2].sum()) for picture in (small, big)]
    assert line[1] == pytest.approx(4 * line[0], rel=0.2)
    label = [int(picture[:, picture.shape[1] // 5].sum()) for picture in (small, big)]
    assert label[1] == pytest.approx(4 * label[0], rel=0.2)


def test_a_hundred_masks_on_48_megapixels_take_less_than_a_gigabyte() -> None:
    found = large(100, (6000, 8000))
    rgb = np.zeros((6000, 8000, 3), np.uint8)
    forget_the_peak()
    before = resident("VmRSS")
    picture = found.draw(rgb)
    assert picture.size == (8000, 6000)
    records = found.to_coco(1)
    assert len(records) == 100
    assert resident("VmHWM") - before < 1e9
