"""Data sets for training: layouts, classes, and what is wrong with them."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import shapes
from hotcoco import mask as coco_mask

from vitadapter_zoo import DatasetError
from vitadapter_zoo.evaluation.dataset import read_dataset
from vitadapter_zoo.training.data import described, read_data, write_coco
from vitadapter_zoo.training.masks import pixels_of, rasterised

LAYOUTS = (shapes.roboflow, shapes.coco, shapes.yolo)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_objects(
    layout: Callable[[Path], Path], tmp_path: Path
) -> None:
    found = read_data(layout(tmp_path / "data"))
    assert found.classes == shapes.CLASSES
    assert found.valid is not None
    for split in (found.train, found.valid):
        assert len(split.samples) == 4
        for number, sample in enumerate(split.samples):
            drawn = shapes.draw(tmp_path / "again.png", number)
            assert sample.size == (shapes.SIDE, shapes.SIDE)
            assert [one.label for one in sample.instances] == [kind for kind, _ in drawn]
            for one, (_, polygon) in zip(sample.instances, drawn, strict=True):
                assert one.segmentation[0] == pytest.approx(polygon, abs=1e-4)
                xs, ys = polygon[0::2], polygon[1::2]
                assert one.box == pytest.approx((min(xs), min(ys), max(xs), max(ys)), abs=1e-4)


def test_explicit_files(tmp_path: Path) -> None:
    root = shapes.coco(tmp_path)
    pairs = [
        (root / "annotations" / f"instances_{part}2017.json", root / f"{part}2017")
        for part in ("train", "val")
    ]
    found = read_data(train=pairs[0], valid=pairs[1])
    assert len(found.train.samples) == len(found.valid.samples if found.valid else ()) == 4
    assert read_data(train=pairs[0]).valid is None


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """A correct annotation file's content; the images are in ``tmp_path / "train"``."""
    return shapes.annotations(tmp_path / "train", 3)


def read(content: dict[str, Any], tmp_path: Path, **options: Any) -> Any:
    source = shapes.write(tmp_path / "train" / "_annotations.coco.json", content)
    return read_data(tmp_path, **options), source


def test_one_class_and_a_super_category_of_its_name(
    content: dict[str, Any], tmp_path: Path
) -> None:
    content["categories"] = [
        {"id": 0, "name": "shape", "supercategory": "none"},
        {"id": 1, "name": "shape", "supercategory": "shape"},
    ]
    for one in content["annotations"]:
        one["category_id"] = 1
    assert read(content, tmp_path)[0].classes == ("shape",)


def test_classes_without_objects_stay(content: dict[str, Any], tmp_path: Path) -> None:
    content["categories"].append({"id": 300, "name": "star", "supercategory": "shapes"})
    found, _ = read(content, tmp_path)
    assert found.classes == ("circle", "square", "star")
    assert "no objects of star" in described(found.train, "train")


def box(one: dict[str, Any], *values: float) -> None:
    one["bbox"] = list(values)


# A change to the first annotation, and what is counted for it.
LEFT_OUT: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "outside": (lambda one: box(one, 70, 5, 10, 10), "objects outside of their image (1)"),
    "no width": (lambda one: box(one, 5, 5, 0, 10), "objects without an area (1)"),
    "no area": (lambda one: one.update(area=0), "objects without an area (1)"),
    "not a number": (
        lambda one: box(one, 5, 5, float("nan"), 10),
        "objects whose box is not four numbers (1)",
    ),
    "three numbers": (lambda one: box(one, 5, 5, 10), "objects whose box is not four numbers (1)"),
    "infinite area": (lambda one: one.update(area=math.inf), "objects without an area (1)"),
    "a polygon with NaN": (
        lambda one: one.update(segmentation=[[1, 1, math.nan, 5, 9, 9]]),
        "objects without a mask (1)",
    ),
    "no mask": (lambda one: one.update(segmentation=[]), "objects without a mask (1)"),
    "a line": (lambda one: one.update(segmentation=[[1, 1, 5, 5]]), "objects without a mask (1)"),
    "other size": (
        lambda one: one.update(segmentation={"size": [64, 65], "counts": [64 * 65]}),
        "objects whose mask has another size than their image (1)",
    ),
    "runs too long": (
        lambda one: one.update(segmentation={"size": [64, 64], "counts": [10, 5000]}),
        "objects whose mask has another size than their image (1)",
    ),
    "runs of another image": (
        lambda one: one.update(segmentation={"size": [64, 64], "counts": "0PP1"}),  # 32 x 32
        "objects whose mask has another size than their image (1)",
    ),
    "damaged runs": (
        lambda one: one.update(segmentation={"size": [64, 64], "counts": "PPPPPPPPP"}),
        "objects whose mask has another size than their image (1)",
    ),
    "crowd": (lambda one: one.update(iscrowd=1), "crowds (1)"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_objects_are_left_out_with_a_count(
    case: str, content: dict[str, Any], tmp_path: Path
) -> None:
    change, reason = LEFT_OUT[case]
    change(content["annotations"][0])
    found, _ = read(content, tmp_path)
    assert described(found.train, "train") == f"train: 3 images, 5 objects; left out: {reason}"


def test_a_box_partly_outside_is_clipped(content: dict[str, Any], tmp_path: Path) -> None:
    box(content["annotations"][0], -5, 50, 30, 30)
    found, _ = read(content, tmp_path)
    assert found.train.samples[0].instances[0].box == (0, 50, 25, 64)


def test_images_without_objects(content: dict[str, Any], tmp_path: Path) -> None:
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != 1]
    found, _ = read(content, tmp_path)
    assert [sample.image_id for sample in found.train.samples] == [0, 2]
    assert "images without objects (1)" in described(found.train, "train")
    found, _ = read(content, tmp_path, keep_empty=True)
    assert [len(sample.instances) for sample in found.train.samples] == [2, 0, 2]


def test_annotations_that_are_there_twice(content: dict[str, Any], tmp_path: Path) -> None:
    content["annotations"].append(dict(content["annotations"][0]))
    content["annotations"][2]["id"] = content["annotations"][1]["id"]  # another object
    found, _ = read(content, tmp_path)
    assert sum(len(sample.instances) for sample in found.train.samples) == 6
    assert "annotations that are there twice (1)" in described(found.train, "train")


def test_validation_images_without_objects_are_one_error(tmp_path: Path) -> None:
    root = shapes.roboflow(tmp_path)
    source = root / "valid" / "_annotations.coco.json"
    source.write_text(json.dumps({**json.loads(source.read_text()), "annotations": []}))
    with pytest.raises(DatasetError, match="has no objects in its validation images"):
        read_data(root)


def drop_file(content: dict[str, Any], folder: Path) -> None:
    (folder / content["images"][1]["file_name"]).unlink()


def break_file(content: dict[str, Any], folder: Path) -> None:
    (folder / content["images"][1]["file_name"]).write_bytes(b"no image")


def resize_file(content: dict[str, Any], folder: Path) -> None:
    cv2.imwrite(str(folder / content["images"][1]["file_name"]), np.zeros((32, 64, 3), np.uint8))


# A change to the content or the files, and what the one error says.
REFUSED: dict[str, tuple[Callable[[dict[str, Any], Path], Any], str]] = {
    "no objects": (
        lambda content, _: content.update(annotations=[]),
        r"no objects to train on \(left out: images without objects \(3\)\)",
    ),
    "no masks": (
        lambda content, _: [one.update(segmentation=[]) for one in content["annotations"]],
        r"no objects to train on \(left out: objects without a mask \(6\), images",
    ),
    "missing file": (drop_file, r"of the 3 images of .*, 1 is missing, .*001.png"),
    "damaged file": (break_file, r"1 is damaged, .*001.png"),
    "other size": (resize_file, r"1 is of another size than annotated, .*\(64 x 32 instead of 64"),
    "image id twice": (lambda content, _: content["images"][1].update(id=0), "image id 0 twice"),
    "category id twice": (
        lambda content, _: content["categories"][1].update(id=1),
        "category id 1 twice",
    ),
    "category name twice": (
        lambda content, _: content["categories"][1].update(name="circle"),
        "two categories named 'circle'",
    ),
    "unknown image": (
        lambda content, _: content["annotations"][0].update(image_id=99),
        "names an image or class that the file does not have",
    ),
    "unknown class": (
        lambda content, _: content["annotations"][0].update(category_id=99),
        "names an image or class that the file does not have",
    ),
    "no ids": (lambda content, _: content["images"][0].pop("id"), "not in COCO's instances format"),
    "no annotations": (lambda content, _: content.pop("annotations"), "has no annotations"),
    "an id that is none": (
        lambda content, _: content["annotations"][0].update(image_id=[1]),
        "a list of 1 is no id",
    ),
    "endless size": (
        lambda content, _: content["images"][0].update(height=10**400, width=math.inf),
        "not in COCO's instances format",
    ),
    "a class without a name": (
        lambda content, _: content["categories"][0].update(name=None),
        "category 1 of .* has no name",
    ),
    "a class of terminal escapes": (
        lambda content, _: [one.update(name="\x1b[2J") for one in content["categories"]],
        r"two categories named '\\x1b\[2J'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_data_are_refused(case: str, content: dict[str, Any], tmp_path: Path) -> None:
    change, message = REFUSED[case]
    change(content, tmp_path / "train")
    with pytest.raises(DatasetError, match=message):
        read(content, tmp_path)


@pytest.mark.parametrize("first", [2**53 + 1, -5, "a", "9" * 5000, "both"])
def test_ids_are_names(first: int | str, content: dict[str, Any], tmp_path: Path) -> None:
    """Large, negative and text ids, which float64 and sorting would mix up."""
    plain, _ = read(content, tmp_path)
    renamed = {
        key: first + key if isinstance(first, int) else f"{first}{key}" for key in range(1, 4)
    }
    if first == "both":
        renamed[1] = 7  # a number among texts
    for kind, key in (("images", "id"), ("annotations", "image_id")):
        for one in content[kind]:
            one[key] = renamed[one[key] + 1]
    for kind, key in (("categories", "id"), ("annotations", "category_id")):
        for one in content[kind]:
            one[key] = renamed[one[key]]
    found, root = read(content, tmp_path)
    assert found.classes == plain.classes
    for one, other in zip(found.train.samples, plain.train.samples, strict=True):
        assert (one.path, one.instances) == (other.path, other.instances)
    write_coco(found.train, tmp_path / "valid.json")
    again = read_dataset(tmp_path / "valid.json", root)
    assert {image.image_id for image in again.images} == set(renamed.values())


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_annotations_in_every_unicode_encoding(
    encoding: str, content: dict[str, Any], tmp_path: Path
) -> None:
    content["categories"][0]["name"] = "Kreis ○"
    shapes.write(tmp_path / "train" / "_annotations.coco.json", content).write_bytes(
        json.dumps(content, ensure_ascii=False).encode(encoding)
    )
    assert read_data(tmp_path).classes == ("Kreis ○", "square")


def test_deeply_nested_annotations_are_one_error(tmp_path: Path) -> None:
    source = tmp_path / "train" / "_annotations.coco.json"
    source.parent.mkdir()
    source.write_text("[" * 100_000)
    with pytest.raises(DatasetError, match="nested too deeply"):
        read_data(tmp_path)


ALIASES = "\n".join(
    ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))]
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{ALIASES}\nnames: *a39\ntrain: images", "a list of 2 is not a text"),
        (f"{ALIASES}\nnames: [a]\ntrain: *a39", "a list of 2 is not a text"),
        ("names: " + "[" * 5000, "is not a YOLO data set"),
        ("names: [a]\ntrain: 2024-13-45 10:00:00", "is not a YOLO data set"),
        ("names: ['\\e[2J']\ntrain: '\\e[2J'", "is not there"),
        ("names: [a]", "has no images in train"),
        ("names: {-1: a}\ntrain: images", "'-1' is not the number of a class"),
        ("names: {a: 0}\ntrain: images", "is not a YOLO data set"),
    ],
)
def test_bad_yolo_descriptions_are_one_error(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text(content)
    with pytest.raises(DatasetError, match=message) as caught:
        read_data(tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_a_list_of_images_that_is_no_text_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("names: [a]\ntrain: list.txt")
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DatasetError, match="cannot read the list of images"):
        read_data(tmp_path)


def test_other_classes_in_the_validation_annotations(tmp_path: Path) -> None:
    root = shapes.roboflow(tmp_path)
    source = root / "valid" / "_annotations.coco.json"
    source.write_text(source.read_text().replace('"circle"', '"ring"'))
    with pytest.raises(DatasetError, match=r"objects of 'ring', which the training annotations"):
        read_data(root)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.1 0.1 x 0.2", r"line 1 of .*000.txt is not `class x1 y1"),
        ("inf 0.1 0.1 0.2 0.1 0.2 0.2", r"line 1 of .*000.txt is not `class x1 y1"),
        ("2 0.1 0.1 0.2 0.1 0.2 0.2", r"has class 2, but data.yaml names 2 classes"),
    ],
)
def test_bad_yolo_labels_are_refused(line: str, message: str, tmp_path: Path) -> None:
    root = shapes.yolo(tmp_path)
    (root / "train" / "labels" / "000.txt").write_text(line)
    with pytest.raises(DatasetError, match=message):
        read_data(root)


@pytest.mark.parametrize("keys", [("3", "11"), ("'3'", "'11'")])
def test_yolo_class_numbers_may_have_gaps(keys: tuple[str, str], tmp_path: Path) -> None:
    """As in data sets that number their classes as COCO does."""
    root = shapes.yolo(tmp_path)
    plain = read_data(root)
    (root / "data.yaml").write_text(
        f"train: train/images\nval: valid/images\nnames:\n  {keys[1]}: square\n"
        f"  {keys[0]}: circle\n"
    )
    for path in root.rglob("labels/*.txt"):
        lines = path.read_text().splitlines()
        path.write_text("".join(f"{(3, 11)[int(line[0])]}{line[1:]}\n" for line in lines))
    found = read_data(root)
    assert found.classes == ("circle", "square")
    assert [one.instances for one in found.train.samples] == [
        one.instances for one in plain.train.samples
    ]
    (root / "train" / "labels" / "000.txt").write_text("4 0.1 0.1 0.2 0.1 0.2 0.2")
    with pytest.raises(DatasetError, match=r"has class 4, but .* names 2 classes, 3 to 11"):
        read_data(root)


def test_yolo_boxes_are_not_masks(tmp_path: Path) -> None:
    root = shapes.yolo(tmp_path)
    for path in (root / "train" / "labels").iterdir():
        path.write_text("0 0.5 0.5 0.2 0.2\n")
    with pytest.raises(DatasetError, match="are boxes, not masks"):
        read_data(root)


def test_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(DatasetError, match=re.escape("is not a data set (it holds photos)")):
        read_data(tmp_path)
    with pytest.raises(DatasetError, match="no such folder"):
        read_data(tmp_path / "absent")


def test_masks_in_every_form_are_drawn_the_same(content: dict[str, Any], tmp_path: Path) -> None:
    polygon = content["annotations"][0]["segmentation"]
    rle = coco_mask.merge(coco_mask.frPyObjects(polygon, 64, 64))
    pixels = np.asarray(coco_mask.decode(rle))
    flat = pixels.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=0, append=1 - flat[-1]))
    counts = np.diff(edges, prepend=0).tolist()
    text = rle["counts"].decode() if isinstance(rle["counts"], bytes) else rle["counts"]
    for segmentation in (
        polygon,
        {"size": [64, 64], "counts": counts},
        {"size": [64, 64], "counts": text},
    ):
        content["annotations"][0]["segmentation"] = segmentation
        found, _ = read(content, tmp_path)
        drawn = rasterised(found.train.samples[0].instances, 64, 64)
        assert np.array_equal(drawn[0], pixels)
        assert drawn.shape == (2, 64, 64)


def test_compressed_runs_cover_their_image() -> None:
    generator = np.random.default_rng(0)
    for density in (0, 0.01, 0.5, 0.99, 1):
        height, width = (int(side) for side in generator.integers(1, 300, 2))
        pixels = (generator.random((height, width)) < density).astype(np.uint8)
        if density == 0.5:  # long runs that differ by much
            pixels = np.repeat(pixels, 40, axis=0)
        counts = coco_mask.encode(np.asfortranarray(pixels))["counts"]
        text = counts.decode() if isinstance(counts, bytes) else counts
        assert pixels_of(text) == pixels.size
        assert pixels_of(text + "1") != pixels.size
    assert pixels_of("") == pixels_of("\u20ac") == -1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_validation_images_are_written_for_the_scorer(
    layout: Callable[[Path], Path], tmp_path: Path
) -> None:
    found = read_data(layout(tmp_path / "data"))
    assert found.valid is not None
    write_coco(found.valid, tmp_path / "valid.json")
    dataset = read_dataset(tmp_path / "valid.json", found.valid.folder)
    assert dataset.category_ids(found.classes) == (1, 2)
    assert all(image.path.is_file() for image in dataset.images)
    written = json.loads((tmp_path / "valid.json").read_text())["annotations"]
    assert len(written) == 8
    assert all(one["area"] > 0 for one in written)
