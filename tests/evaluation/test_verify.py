"""``verify``: figures, verdicts, and data that cannot be evaluated."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import standins
import torch
from coco_oracle import by_pycocotools, random_data, written
from verification import PICTURES, annotation_file, figures

import vitadapter_zoo
from vitadapter_zoo import (
    DatasetError,
    ImageError,
    MaskRCNN,
    Verification,
    ZooError,
)
from vitadapter_zoo.backends.comparison import matches
from vitadapter_zoo.evaluation.dataset import Image, read_dataset, sampling_order
from vitadapter_zoo.evaluation.evaluator import Evaluator, Prepared, read
from vitadapter_zoo.evaluation.ids import Id
from vitadapter_zoo.evaluation.scoring import KINDS
from vitadapter_zoo.evaluation.verdict import judge
from vitadapter_zoo.reports import report


def test_gives_the_figures_of_pycocotools(undisturbed: Verification, coco: Path) -> None:
    results = list(undisturbed.results)
    assert len(results) == undisturbed.total == PICTURES
    assert [one.image_id for one in results] == sorted(one.image_id for one in results)
    expected = [by_pycocotools(annotation_file(coco), results, kind).stats for kind in KINDS]
    np.testing.assert_allclose(figures(undisturbed), np.concatenate(expected), rtol=0, atol=1e-9)
    assert 0.1 < undisturbed.mask.ap < 0.9


@pytest.mark.parametrize("name", ["adapter-t-deit-3x", "vit-t-deit-3x"])
def test_records_the_masks_that_the_original_gave(
    name: str, standin_model: Callable[[str], MaskRCNN]
) -> None:
    model = standin_model(name)
    stored = np.load(standins.DATA / "outputs" / f"{name}.npz")
    height, width = (int(side) for side in stored["meta.ori_shape"][:2])
    evaluator = Evaluator(model, tuple(range(80)))
    task = read(Image(1, standins.PHOTO, (height, width), frozenset()))
    prepared = evaluator.prepare(task)
    assert isinstance(prepared, Prepared)
    result = evaluator.finish(prepared, evaluator.detect(prepared))
    apart = 1e4  # keeps the classes from matching each other
    x, y, w, h = torch.tensor(result.boxes).unbind(1)
    shift = apart * torch.tensor(result.category_ids)[:, None]
    found = matches(
        torch.stack([x, y, x + w, y + h], dim=1) + shift,
        torch.tensor(result.scores),
        torch.from_numpy(stored["boxes"] + apart * stored["labels"][:, None]),
        torch.from_numpy(stored["scores"]),
    )
    assert sorted(found.tolist()) == list(range(len(result.scores)))
    ours = [result.masks[place] for place in found.tolist()]
    assert ours == [str(counts) for counts in stored["mask_rle"]]


def test_the_verdict_is_about_a_tenth_of_a_point(
    detector: MaskRCNN, coco: Path, undisturbed: Verification, tmp_path: Path
) -> None:
    box, mask = (round(one.measured, 1) for one in undisturbed.comparisons)
    run = undisturbed.details["run"]

    def verdict(*expected: float) -> str:
        return vitadapter_zoo.verify(detector, coco, run=run, expected=expected).verdict  # type: ignore[arg-type]

    assert verdict(box, mask) == "confirmed"
    assert verdict(box + 0.1, mask - 0.1) == "confirmed"
    assert verdict(box + 0.2, mask) == "refuted"
    assert verdict(box, mask - 0.2) == "refuted"
    assert undisturbed.verdict == "inconclusive"  # nothing is published for these data
    assert "val2017" in undisturbed.reason


def test_a_part_never_confirms_but_may_refute(
    detector: MaskRCNN, coco: Path, undisturbed: Verification
) -> None:
    run = undisturbed.details["run"]
    near = vitadapter_zoo.verify(
        detector, coco, run=run, limit=4,
        expected=(undisturbed.comparisons[0].measured, undisturbed.comparisons[1].measured),
    )  # fmt: skip
    assert near.verdict == "inconclusive"
    assert near.evaluated == 4
    for one in near.comparisons:
        assert one.interval is not None
        assert one.interval.low <= one.interval.estimate <= one.interval.high
    # The four images were in the run: nothing was computed.
    assert near.details["images_before"] == 4


def test_a_part_refutes_what_lies_outside_its_interval(tmp_path: Path) -> None:
    content, results = random_data(9, images=120)
    data = read_dataset(written(content, tmp_path), tmp_path)
    whole = judge("model", data, results, None)
    measured = (100 * whole.box.ap, 100 * whole.mask.ap)
    chosen = {one.image_id for one in sampling_order(data, 0)[:70]}
    part = [one for one in results if one.image_id in chosen]

    def of_part(*published: float) -> Verification:
        return judge("model", data, part, published, random_part=True)  # type: ignore[arg-type]

    assert of_part(*measured).verdict == "inconclusive"
    for far in ((measured[0] + 25, measured[1]), (measured[0], measured[1] - 25)):
        found = of_part(*far)
        assert found.verdict == "refuted"
        assert "interval" in found.reason
    # Images that nobody drew at random prove nothing, and neither do very few.
    assert judge("model", data, part, (99.0, 99.0)).verdict == "inconclusive"
    few = judge("model", data, part[:20], (99.0, 99.0), random_part=True)
    assert few.verdict == "inconclusive"
    # Classes that no image of the part has could have any AP.
    unseen = next(one for one in results if one.category_ids).category_ids[0]
    without = [
        one
        for one in results
        if unseen not in next(i for i in data.images if i.image_id == one.image_id).category_ids
    ]
    bounded = judge("model", data, without, measured, random_part=True)
    assert len(bounded.unseen) == 1
    assert bounded.verdict == "inconclusive"


def test_batches_are_a_run_of_their_own_and_give_the_same_digits_after_a_stop(
    detector: MaskRCNN, coco: Path, undisturbed: Verification, tmp_path: Path
) -> None:
    with pytest.raises(ZooError, match="batch_size"):
        vitadapter_zoo.verify(detector, coco, batch_size=3, run=undisturbed.details["run"])
    whole = vitadapter_zoo.verify(detector, coco, batch_size=3, run=tmp_path / "whole")
    assert figures(whole) == pytest.approx(figures(undisturbed), abs=0.5)
    vitadapter_zoo.verify(detector, coco, batch_size=3, run=tmp_path / "parts", limit=4)
    parts = vitadapter_zoo.verify(detector, coco, batch_size=3, run=tmp_path / "parts")
    assert parts.details["images_before"] == 4
    assert figures(parts) == figures(whole)
    with pytest.raises(ValueError, match="leave batch_size or workers out"):
        vitadapter_zoo.verify(detector, coco, batch_size=3, workers=2)


def test_time_runs_out(detector: MaskRCNN, coco: Path, tmp_path: Path) -> None:
    found = vitadapter_zoo.verify(
        detector, coco, run=tmp_path / "run", max_minutes=1e-3, expected=(50, 50)
    )
    assert found.evaluated < PICTURES
    assert found.verdict == "inconclusive"


def remove_picture(root: Path) -> Path:
    path = min((root / "val2017").iterdir())
    path.unlink()
    return path


def spoil_picture(root: Path) -> Path:
    path = min((root / "val2017").iterdir())
    path.write_bytes(path.read_bytes()[:100])
    return path


@pytest.mark.parametrize("spoil", [remove_picture, spoil_picture])
def test_bad_images_are_named_and_may_be_left_out(
    spoil: Callable[[Path], Path], detector: MaskRCNN, coco: Path, tmp_path: Path
) -> None:
    root = tmp_path / "coco"
    shutil.copytree(coco, root)
    path = spoil(root)
    run = tmp_path / "run"
    with pytest.raises(ImageError, match=rf"{path.name}.*--skip-bad-images"):
        vitadapter_zoo.verify(detector, root, run=run)
    found = vitadapter_zoo.verify(detector, root, run=run, expected=(50, 50), skip_bad_images=True)
    assert found.verdict == "inconclusive"
    image_id = next(
        one.image_id
        for one in read_dataset(annotation_file(coco), coco).images
        if one.path.name == path.name
    )
    assert list(found.skipped) == [image_id]
    assert path.name in found.skipped[image_id]
    assert found.evaluated == PICTURES - 1
    # Restored, it is evaluated after all.
    shutil.copy(coco / "val2017" / path.name, path)
    assert vitadapter_zoo.verify(detector, root, run=run).skipped == {}


def drop_masks(content: dict[str, Any]) -> None:
    for annotation in content["annotations"]:
        del annotation["segmentation"]


def add_background(content: dict[str, Any]) -> None:
    content["categories"].insert(0, {"id": 0, "name": "background"})


def repeat_image(content: dict[str, Any]) -> None:
    content["images"].append(content["images"][0])


def orphan(content: dict[str, Any]) -> None:
    content["annotations"][0]["image_id"] = 999_999


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("annotations"), "holds no annotations.*instances_val2017"),
        (drop_masks, "has no mask"),
        (add_background, "19 classes and the model 18.*'background'"),
        (repeat_image, "twice"),
        (orphan, "cut or edited"),
        (lambda content: content.pop("categories"), "not in COCO's instances format"),
        (lambda content: content["images"][0].update(width=999), "belongs to another data set"),
    ],
)
def test_wrong_data_are_told_apart(
    change: Callable[[dict[str, Any]], None],
    message: str,
    detector: MaskRCNN,
    changed: Callable[[Callable[[dict[str, Any]], None]], Path],
) -> None:
    root = changed(change)
    with pytest.raises((DatasetError, ImageError), match=message):
        vitadapter_zoo.verify(detector, root)


def test_what_is_no_coco_folder_is_told(detector: MaskRCNN, coco: Path, tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    shutil.copy(annotation_file(coco), tmp_path / "annotations" / "instances_val2014.json")
    with pytest.raises(DatasetError, match=r"instances_val2014\.json.*val2017"):
        vitadapter_zoo.verify(detector, tmp_path)
    truncated = annotation_file(tmp_path)
    truncated.write_bytes(annotation_file(coco).read_bytes()[:1000])
    (tmp_path / "val2017").mkdir()
    with pytest.raises(DatasetError, match=r"not JSON.*truncated"):
        vitadapter_zoo.verify(detector, tmp_path)


def test_a_model_on_classes_of_its_own(detector: MaskRCNN, coco: Path, tmp_path: Path) -> None:
    """Class names decide, whatever the ids and their order are."""
    content = json.loads(annotation_file(coco).read_text())
    renumbered = {one["id"]: 500 - 3 * one["id"] for one in content["categories"]}
    for one in content["categories"]:
        one["name"] = f"my {one['name']}"
        one["id"] = renumbered[one["id"]]
    content["categories"].reverse()
    for one in content["annotations"]:
        one["category_id"] = renumbered[one["category_id"]]
    path = tmp_path / "own.json"
    path.write_text(json.dumps(content))
    own = copy.deepcopy(detector)
    own.categories = tuple(f"my {name}" for name in detector.categories)
    data = read_dataset(path, coco / "val2017")
    with pytest.raises(DatasetError, match="only the model has 'bicycle'"):
        vitadapter_zoo.verify(detector, data)
    found = vitadapter_zoo.verify(own, data)
    reference = vitadapter_zoo.verify(detector, coco)
    assert found.mask.ap == pytest.approx(reference.mask.ap, abs=1e-12)


def test_images_annotated_without_their_exif_rotation(
    detector: MaskRCNN, coco: Path, undisturbed: Verification, tmp_path: Path
) -> None:
    """Stored on its side and annotated that way, with EXIF data that would turn it upright."""
    root = tmp_path / "coco"
    shutil.copytree(coco, root)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # orientation: to show it, rotate it by 90 degrees
    content = exif.tobytes()
    segment = b"\xff\xe1" + (len(content) + 2).to_bytes(2, "big") + content
    for path in (root / "val2017").iterdir():
        jpeg = path.read_bytes()
        path.write_bytes(jpeg[:2] + segment + jpeg[2:])
    with pytest.raises(ImageError, match=r"EXIF data rotate it.*--ignore-exif"):
        vitadapter_zoo.verify(detector, root)
    data = read_dataset(annotation_file(root), root / "val2017", ignore_exif=True)
    found = vitadapter_zoo.verify(detector, data)
    assert figures(found) == figures(undisturbed)
    assert found.details["identity"]["exif"] == "ignored"
    report.write(found, tmp_path / "report")
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    page = (tmp_path / "report" / "report.html").read_text()
    assert content["worst_images"]
    assert "No picture" not in page
    with pytest.raises(ValueError, match="mmdet"):
        vitadapter_zoo.verify(detector, data, backend="mmdet")


def test_exchanged_sides_without_exif_are_told_apart(
    detector: MaskRCNN, changed: Callable[[Callable[[dict[str, Any]], None]], Path]
) -> None:
    def exchange(content: dict[str, Any]) -> None:
        for image in content["images"]:
            image["width"], image["height"] = image["height"], image["width"]
        del content["annotations"][1:]
        image = next(
            one for one in content["images"] if one["id"] == content["annotations"][0]["image_id"]
        )
        content["annotations"][0]["segmentation"] = [[0, 0, 9, 0, 9, 9]]

    with pytest.raises(ImageError, match="height and width are exchanged"):
        vitadapter_zoo.verify(detector, changed(exchange))


def test_every_beginning_of_the_sampling_order_is_stratified(coco: Path) -> None:
    data = read_dataset(annotation_file(coco), coco / "val2017")
    first, second = (key for key, _ in data.categories[:2])
    classes = [frozenset({first}), frozenset({first, second}), frozenset[Id]()]
    images = tuple(
        Image(key, Path(f"{key}.jpg"), (1, 1), classes[0 if key < 60 else 1 if key < 90 else 2])
        for key in range(100)
    )
    many = dataclasses.replace(data, images=images)
    order = sampling_order(many, seed=3)
    assert sorted(one.image_id for one in order) == list(range(100))
    assert order == sampling_order(many, seed=3)
    assert order != sampling_order(many, seed=4)
    for count in (10, 20, 50, 90):
        share = [sum(one.category_ids == kind for one in order[:count]) for kind in classes]
        expected = [0.6 * count, 0.3 * count, 0.1 * count]
        assert all(abs(a - b) <= 2 for a, b in zip(share, expected, strict=True))
    # Over many seeds every image is equally often among the first ten.
    times = np.zeros(100)
    for seed in range(2000):
        for one in sampling_order(many, seed)[:10]:
            times[int(one.image_id)] += 1
    assert np.abs(times / 2000 - 0.1).max() < 0.03
