"""Annotation and result files as people have them: what is scored, and what is refused."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_oracle import by_pycocotools, random_data, written

from vitadapter_zoo import DatasetError
from vitadapter_zoo.evaluation import read_dataset, read_results
from vitadapter_zoo.evaluation.ids import Id
from vitadapter_zoo.evaluation.run import ImageResult
from vitadapter_zoo.evaluation.scoring import KINDS, Annotations
from vitadapter_zoo.evaluation.verdict import judge

Json = dict[str, Any]


def figures(annotations: Path, results: Path) -> list[float]:
    """The 24 figures, as `score` computes them."""
    data = read_dataset(annotations, annotations.parent)
    found = judge("model", data, read_results(results, data), None)
    return [*found.box.figures.values(), *found.mask.figures.values()]


def expected(annotations: Path, results: list[ImageResult]) -> list[float]:
    return [x for kind in KINDS for x in by_pycocotools(annotations, results, kind).stats]


def detections(results: list[ImageResult]) -> list[Json]:
    return [one for result in results for one in result.to_coco()]


def dumped(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def rename(content: Json, found: list[Json], name: Callable[[int], Id]) -> tuple[Json, list[Json]]:
    """The same data with other ids of images, annotations and categories."""
    content, found = copy.deepcopy(content), copy.deepcopy(found)
    for entry in [*content["images"], *content["categories"]]:
        entry["id"] = name(entry["id"])
    for entry in [*content["annotations"], *found]:
        entry["image_id"] = name(entry["image_id"])
        entry["category_id"] = name(entry["category_id"])
    for entry in content["annotations"]:
        entry["id"] = name(entry["id"])
    return content, found


NAMES: dict[str, Callable[[int], Id]] = {
    "beyond float64": lambda key: 2**53 + key,
    "beyond int64": lambda key: 2**70 + key,
    "negative": lambda key: key - 2**60,
    "around zero": lambda key: key - 5000,
    "text of digits": str,
    "text with digits": lambda key: f"image-{key}.jpg",
    "text with other digits": lambda key: f"{key}²",
    "text and numbers": lambda key: f"{key}-x" if key > 5000 else key,
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_ids_are_names(name: Callable[[int], Id], tmp_path: Path) -> None:
    content, results = random_data(11)  # with many equal scores, of which the order counts
    wanted = expected(written(content, tmp_path), results)
    renamed, found = rename(content, detections(results), name)
    (tmp_path / "renamed").mkdir()
    measured = figures(
        written(renamed, tmp_path / "renamed"), dumped(tmp_path / "results.json", found)
    )
    np.testing.assert_allclose(measured, wanted, rtol=0, atol=1e-9)


def test_an_annotation_of_id_0_is_found_too(tmp_path: Path) -> None:
    content, results = random_data(12)
    wanted = expected(written(content, tmp_path), results)
    for key, entry in enumerate(content["annotations"]):
        entry["id"] = key  # pycocotools takes the object of id 0 for none
    found = dumped(tmp_path / "results.json", detections(results))
    measured = figures(written(content, tmp_path), found)
    np.testing.assert_allclose(measured, wanted, rtol=0, atol=1e-9)


def test_missed_objects_are_named_by_the_ids_of_the_file(tmp_path: Path) -> None:
    content, _ = random_data(13)
    renamed, _ = rename(content, [], lambda key: f"a-{key}")
    renamed["annotations"].reverse()
    data = read_dataset(written(renamed, tmp_path), tmp_path)
    none = [ImageResult(image.image_id, image.size) for image in data.images]
    for result, unmatched in zip(none, Annotations(data).unmatched(none, "mask"), strict=True):
        objects = [
            one["id"]
            for one in renamed["annotations"]
            if one["image_id"] == result.image_id and not one["iscrowd"]
        ]
        assert sorted(map(str, unmatched.missed)) == sorted(objects)


ADDITIONS: dict[str, Json] = {
    "Roboflow": {"info": {"year": "2024", "version": 1, "contributor": None}, "licenses": None},
    "a list": {"info": [], "licenses": "CC BY 4.0", "type": 7},
    "deep": {"info": {"a": [[[{"b": [1, 2, {"c": None}]}]]]}, "licenses": [{"id": "x"}, 3]},
}


@pytest.mark.parametrize("addition", ADDITIONS.values(), ids=ADDITIONS)
def test_what_is_not_scored_is_not_looked_at(addition: Json, tmp_path: Path) -> None:
    content, results = random_data(14)
    wanted = expected(written(content, tmp_path), results)
    content |= addition
    for image in content["images"]:
        image |= {"date_captured": 0, "license": "none", "coco_url": None, "flickr_url": 3}
    for entry in content["annotations"]:
        entry |= {"ignore": 1, "attributes": {"occluded": False}, "score": "high", "keypoints": 0}
    for category in content["categories"]:
        category |= {"supercategory": None, "keypoints": "no", "skeleton": 1}
    measured = figures(
        written(content, tmp_path), dumped(tmp_path / "results.json", detections(results))
    )
    np.testing.assert_allclose(measured, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["fruit", "c0"])
def test_a_category_that_only_groups_others_is_no_class(name: str, tmp_path: Path) -> None:
    """Roboflow writes the data set's name as category 0, sometimes the same as a class's."""
    content, results = random_data(17)
    content["categories"][0]["name"] = "c0"
    plain = written(content, tmp_path)
    wanted, classes = expected(plain, results), read_dataset(plain, tmp_path).categories
    for category in content["categories"]:
        category["supercategory"] = name
    content["categories"].insert(0, {"id": -7, "name": name, "supercategory": "none"})
    grouped = written(content, tmp_path)
    assert read_dataset(grouped, tmp_path).categories == classes
    other = dumped(tmp_path / "results.json", detections(results))
    np.testing.assert_allclose(figures(grouped, other), wanted, rtol=0, atol=1e-9)


def test_a_super_category_with_objects_is_a_class(tmp_path: Path) -> None:
    content, _ = random_data(18)
    first = content["categories"][0]["name"]
    for category in content["categories"]:
        category["supercategory"] = first
    assert read_dataset(written(content, tmp_path), tmp_path).categories[0][1] == first


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_every_encoding_of_json_is_read(encoding: str, tmp_path: Path) -> None:
    content, results = random_data(15, images=5)
    content["categories"][0]["name"] = "Grünkohl"
    path = written(content, tmp_path)
    wanted = expected(path, results)
    path.write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    other = tmp_path / "results.json"
    other.write_bytes(json.dumps(detections(results)).encode(encoding))
    np.testing.assert_allclose(figures(path, other), wanted, rtol=0, atol=1e-9)


def test_polygons_and_both_kinds_of_run_lengths_are_scored_alike(tmp_path: Path) -> None:
    content, results = random_data(16)
    sizes = {one["id"]: [one["height"], one["width"]] for one in content["images"]}
    for place, entry in enumerate(content["annotations"]):
        x, y, w, h = entry["bbox"]
        if place % 3 == 0 and not entry["iscrowd"]:
            entry["segmentation"] = [
                [x, y, x + w, y, x + w / 2, y + h + 0.5],
                [x - 9, y, x + 5, y, x + 5, y + 5, x - 9, y + 7],
                [x, y, x + w, y + h],  # two points beside polygons cover nothing
            ]
        elif place % 3 == 1:
            height, width = sizes[entry["image_id"]]
            first = int(x) * height + int(y)
            counts = [first, 40, height * width - first - 40]
            entry["segmentation"] = {"size": [height, width], "counts": counts}
    path = written(content, tmp_path)
    measured = figures(path, dumped(tmp_path / "results.json", detections(results)))
    np.testing.assert_allclose(measured, expected(path, results), rtol=0, atol=1e-9)


def first_mask(value: Any) -> Callable[[Json], None]:
    return lambda content: content["annotations"][0].update(segmentation=value)


def first(kind: str, **values: Any) -> Callable[[Json], None]:
    return lambda content: content[kind][0].update(values)


NAN = float("nan")
BAD_ANNOTATIONS: dict[str, tuple[Callable[[Json], None], str]] = {
    "no polygon": (first_mask([[]]), "has no mask"),
    "one point": (first_mask([[1, 2]]), "has no mask"),
    "two points": (first_mask([[1, 2, 3, 4]]), "has no mask"),
    "no list of polygons": (first_mask([1, 2, 3, 4, 5, 6]), "has no mask"),
    "one point three times": (first_mask([[5, 5, 5, 5, 5, 5]]), "cover no pixel"),
    "a line": (first_mask([[3.5, 3.2, 3.5, 3.3, 3.5, 3.25]]), "cover no pixel"),
    "outside of the image": (first_mask([[-50, -50, -40, -50, -40, -40]]), "cover no pixel"),
    "in another image": (first_mask([[1e5, 1e5, 1e5 + 9, 1e5, 1e5, 1e5 + 9]]), "cover no pixel"),
    "null in it": (first_mask([[1, 2, 3, None, 5, 6]]), "coordinates"),
    "nan in it": (first_mask([[1, 2, 3, NAN, 5, 6]]), "coordinates"),
    "infinity in it": (first_mask([[1, 2, 3, float("inf"), 5, 6]]), "coordinates"),
    "text in it": (first_mask([[1, 2, 3, "4", 5, 6]]), "coordinates"),
    "an odd number": (first_mask([[1, 2, 3, 4, 5, 6, 7]]), "an x and no y"),
    "text": (first_mask("mask.png"), "has no mask"),
    "true": (first_mask(True), "has no mask"),
    "empty": (first_mask({}), "has no mask"),
    "no counts": (first_mask({"size": [40, 40]}), "size is not"),
    "short counts": (lambda content: short_counts(content, [5, 5]), "describes 10 pixels"),
    "negative counts": (lambda content: short_counts(content, [-1, 5]), "counts"),
    "half a pixel": (lambda content: short_counts(content, [0.5, 5]), "counts"),
    "damaged text": (lambda content: short_counts(content, "abc"), "damaged"),
    "no ASCII": (lambda content: short_counts(content, "0\u00e9"), "no counts"),
    "nan box": (first("annotations", bbox=[NAN, 1, 2, 3]), "no bbox"),
    "negative box": (first("annotations", bbox=[1, 1, -2, 3]), "no bbox"),
    "huge box": (first("annotations", bbox=[1, 1, 1e300, 3]), "no bbox"),
    "box of three": (first("annotations", bbox=[1, 1, 2]), "no bbox"),
    "box of text": (first("annotations", bbox="1 2 3 4"), "no bbox"),
    "no area": (first("annotations", area=None), "no area"),
    "nan area": (first("annotations", area=NAN), "no area"),
    "negative area": (first("annotations", area=-1), "no area"),
    "crowd of text": (first("annotations", iscrowd="yes"), "no iscrowd"),
    "crowd of null": (first("annotations", iscrowd=None), "no iscrowd"),
    "other image": (first("annotations", image_id=-1), "cut or edited"),
    "image by text": (first("annotations", image_id=[1]), "cut or edited"),
    "no id": (lambda content: content["annotations"][0].pop("id"), "has no id"),
    "id of true": (first("annotations", id=True), "annotation id"),
    "id of null": (first("images", id=None), "image id"),
    "id with a fraction": (first("categories", id=1.5), "category id"),
    "half a surrogate pair": (first("images", id="\ud800"), "image id"),
    "no height": (first("images", height=None), "no height"),
    "no width": (first("images", width=0), "no width"),
    "width of text": (first("images", width="640"), "no width"),
    "too large": (first("images", width=10**6, height=10**6), "more than"),
    "no file": (first("images", file_name=None), "no file_name"),
    "class without a name": (first("categories", name=None), "no name"),
    "class twice": (lambda content: twice(content, "categories"), "twice"),
    "annotation twice": (lambda content: twice(content, "annotations"), "twice"),
    "images of a list": (lambda content: content.update(images=[[1]]), "instances format"),
    "images of text": (lambda content: content.update(images="x"), "instances format"),
    "no images": (lambda content: content.update(images=[]), "is empty"),
}  # fmt: skip


def short_counts(content: Json, counts: Any) -> None:
    size = content["annotations"][0]["segmentation"]["size"]
    content["annotations"][0]["segmentation"] = {"size": size, "counts": counts}


def twice(content: Json, kind: str) -> None:
    content[kind].append(content[kind][0])


@pytest.mark.parametrize(("change", "message"), BAD_ANNOTATIONS.values(), ids=BAD_ANNOTATIONS)
def test_what_cannot_be_scored_is_said_when_the_file_is_read(
    change: Callable[[Json], None], message: str, tmp_path: Path
) -> None:
    content, _ = random_data(17, images=5)
    change(content)
    with pytest.raises(DatasetError, match=message) as raised:
        read_dataset(written(content, tmp_path), tmp_path)
    assert "annotations.json" in str(raised.value)
    assert len(str(raised.value)) < 600
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"images": [' + "9" * 5000 + "]}", "number"),
        ("[]", "result files"),
        ("3", "instances format"),
        ("", "not JSON"),
        ('{"images": [], "annotations"', "not JSON"),
    ],
)
def test_other_json_is_one_error(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(text)
    with pytest.raises(DatasetError, match=message):
        read_dataset(path, tmp_path)
    content, _ = random_data(17, images=2)
    data = read_dataset(written(content, tmp_path), tmp_path)
    if text != "[]":
        with pytest.raises(DatasetError, match=r"own\.json"):
            read_results(path, data)


def test_names_from_a_file_are_escaped(tmp_path: Path) -> None:
    content, _ = random_data(17, images=2)
    content["categories"][0]["name"] = "\x1b[2J" + "x" * 1_000_000
    content["categories"].append(dict(content["categories"][0], id=99))
    with pytest.raises(DatasetError) as raised:
        read_dataset(written(content, tmp_path), tmp_path)
    assert "\x1b" not in str(raised.value)
    assert len(str(raised.value)) < 600


def no_detections(found: list[Json]) -> Any:
    return {"annotations": found}


BAD_RESULTS: dict[str, tuple[Callable[[list[Json]], Any], str]] = {
    "nan score": (lambda found: found[3].update(score=NAN), "detection 3 has a score"),
    "infinite score": (lambda found: found[3].update(score=float("inf")), "detection 3 .*score"),
    "score of text": (lambda found: found[3].update(score="0.9"), "detection 3 .*score"),
    "score of true": (lambda found: found[3].update(score=True), "detection 3 .*score"),
    "no score": (lambda found: found[3].pop("score"), "detection 3 .*score"),
    "nan box": (lambda found: found[3].update(bbox=[1, NAN, 3, 4]), "detection 3 .*bbox"),
    "one without a box": (lambda found: found[3].pop("bbox"), "have a bbox and others, 3 "),
    "one with a box": (lambda found: [one.pop("bbox") for one in found[1:]], "others, 1 "),
    "null box": (lambda found: found[3].update(bbox=None), "detection 3 .*bbox"),
    "negative box": (lambda found: found[3].update(bbox=[1, 1, -3, 4]), "detection 3 .*bbox"),
    "text box": (lambda found: found[3].update(bbox=["1", 1, 3, 4]), "detection 3 .*bbox"),
    "no mask": (lambda found: found[3].pop("segmentation"), "detection 3 .*RLE"),
    "polygon": (lambda found: found[3].update(segmentation=[[1, 2, 3, 4, 5, 6]]), "RLE"),
    "damaged mask": (lambda found: found[3]["segmentation"].update(counts="abc"), "detection 3 "),
    "short mask": (lambda found: found[3]["segmentation"].update(counts="5"), "detection 3 "),
    "half a character": (
        lambda found: found[3]["segmentation"].update(counts="\ud800"), "detection 3 .*RLE",
    ),
    "empty mask": (lambda found: found[3]["segmentation"].update(counts=""), "detection 3 "),
    "other size": (lambda found: found[3]["segmentation"].update(size=[1, 1]), "detection 3 "),
    "other image": (lambda found: found[3].update(image_id=-1), "another data set"),
    "image by text": (lambda found: found[3].update(image_id=str(found[3]["image_id"])), "another"),
    "image of a list": (lambda found: found[3].update(image_id=[1]), "detection 3 "),
    "label": (lambda found: found[3].update(category_id=-1), "category ids"),
    "no category": (lambda found: found[3].pop("category_id"), "detection 3 "),
    "no object": (lambda found: found.insert(3, []), "detection 3 "),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD_RESULTS.values(), ids=BAD_RESULTS)
def test_results_that_cannot_be_scored_are_named_by_their_place(
    change: Callable[[list[Json]], Any], message: str, tmp_path: Path
) -> None:
    content, results = random_data(18, images=6)
    data = read_dataset(written(content, tmp_path), tmp_path)
    found = detections(results)
    change(found)
    path = dumped(tmp_path / "results.json", found)
    with pytest.raises(DatasetError, match=message) as raised:
        read_results(path, data)
    assert "results.json" in str(raised.value)
    assert len(str(raised.value)) < 600


def test_a_box_that_is_absent_is_the_mask_s(tmp_path: Path) -> None:
    content, results = random_data(19, images=6)
    data = read_dataset(written(content, tmp_path), tmp_path)
    found = detections(results)
    for one in found:
        del one["bbox"]
    read = read_results(dumped(tmp_path / "results.json", found), data)
    scores = judge("model", data, read, None)
    wanted = by_pycocotools(data.annotations, results, "mask").stats
    np.testing.assert_allclose(list(scores.mask.figures.values()), wanted, rtol=0, atol=1e-9)
