import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hotcoco import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scenes import text

from vitadapter_zoo.intervals import average_precision, bootstrap
from vitadapter_zoo.records import ImageResult
from vitadapter_zoo.scoring import FIGURES, KINDS, Annotations, Kind, Matches, tabulate


def encoded(pixels: np.ndarray) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(pixels.astype(np.uint8)))
    return {"size": [int(side) for side in rle["size"]], "counts": text(rle["counts"])}


def blob(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """An ellipse, small or large, that may reach over the border."""
    y, x = np.mgrid[:height, :width]
    reach = rng.choice([6, 25, 90])
    a, b = rng.uniform(2, reach, 2)
    cy, cx = rng.uniform(0, height), rng.uniform(0, width)
    return ((y - cy) / a) ** 2 + ((x - cx) / b) ** 2 <= 1


def random_data(
    seed: int, images: int = 30, classes: int = 6, crowded: bool = False
) -> tuple[dict[str, Any], list[ImageResult]]:
    """Annotations and results with everything that COCO's evaluation treats specially.

    Crowds, images without annotations or without detections, classes without objects, tied scores,
    ids with gaps and in no order, and, where ``crowded``, more than 100 detections in an image.
    """
    rng = np.random.default_rng(seed)
    category_ids = [int(key) for key in rng.permutation(90)[:classes] + 1]
    image_ids = [int(key) for key in rng.permutation(10_000)[:images]]
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": key, "name": f"class {key}"} for key in category_ids],
    }
    results = []
    for image_id in image_ids:
        height, width = (int(side) for side in rng.integers(40, 220, 2))
        content["images"].append(
            {"id": image_id, "file_name": f"{image_id}.jpg", "height": height, "width": width}
        )
        found: list[tuple[float, int, list[float], str]] = []
        for _ in range(int(rng.integers(0, 9))):
            pixels = blob(rng, height, width)
            if not pixels.any():
                continue
            rle = encoded(pixels)
            crowd = int(rng.random() < 0.15)
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) * 3 + 5,
                    "image_id": image_id,
                    "category_id": int(rng.choice(category_ids[:-1])),
                    "bbox": [float(v) for v in coco_mask.to_bbox(rle)],
                    "area": float(pixels.sum()),
                    "iscrowd": crowd,
                    "segmentation": rle,
                }
            )
            for _ in range(int(rng.integers(0, 4))):
                shift = tuple(int(s) for s in rng.integers(-3, 4, 2))
                moved = encoded(np.roll(pixels, shift, axis=(0, 1)))
                key = content["annotations"][-1]["category_id"]
                if rng.random() < 0.2:
                    key = int(rng.choice(category_ids))
                box = [float(v) + rng.normal(0, 1) for v in coco_mask.to_bbox(moved)]
                # Few distinct scores, so that many are tied.
                found.append((round(rng.random(), 1), key, box, moved["counts"]))
        if crowded:
            for _ in range(150):
                other = encoded(blob(rng, height, width))
                box = [float(v) for v in coco_mask.to_bbox(other)]
                found.append((round(rng.random(), 2), category_ids[0], box, other["counts"]))
        if rng.random() < 0.15:
            found = []
        found.sort(key=lambda one: -one[0])
        results.append(
            ImageResult(
                image_id,
                (height, width),
                boxes=[box for _, _, box, _ in found],
                scores=[score for score, _, _, _ in found],
                category_ids=[key for _, key, _, _ in found],
                masks=[counts for _, _, _, counts in found],
            )
        )
    return content, results


def written(content: dict[str, Any], folder: Path) -> Path:
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return path


def by_pycocotools(
    path: Path, results: list[ImageResult], kind: Kind, image_ids: list[int] | None = None
) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(path))
        detections = [one for result in results for one in result.to_coco()]
        if kind == "mask":
            for one in detections:
                del one["bbox"]
        evaluation = COCOeval(coco, coco.loadRes(detections), "bbox" if kind == "box" else "segm")
        if image_ids is not None:
            evaluation.params.imgIds = sorted(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("seed", "crowded"), [(0, False), (1, False), (2, False), (3, True)])
def test_every_figure_is_the_one_of_pycocotools(
    tmp_path: Path, seed: int, crowded: bool, kind: Kind
) -> None:
    content, results = random_data(seed, crowded=crowded, images=12 if crowded else 30)
    path = written(content, tmp_path)
    scores = Annotations(path).score(tabulate(results), kind)
    expected = by_pycocotools(path, results, kind)
    np.testing.assert_allclose(
        [scores.figures[name] for name in FIGURES], expected.stats, rtol=0, atol=1e-9
    )
    np.testing.assert_allclose(scores.precision, expected.eval["precision"], rtol=0, atol=1e-9)
    names = {one["id"]: one["name"] for one in content["categories"]}
    for place, key in enumerate(expected.params.catIds):
        values = expected.eval["precision"][:, :, place, 0, -1]
        mean = values[values > -1].mean() if (values > -1).any() else -1
        assert scores.per_class[names[key]] == pytest.approx(mean, abs=1e-9)
    assert 0.05 < scores.ap < 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_is_scored_on_its_own_images(tmp_path: Path, kind: Kind) -> None:
    content, results = random_data(4)
    path = written(content, tmp_path)
    part = results[::3]
    scores = Annotations(path).score(tabulate(part), kind)
    expected = by_pycocotools(path, part, kind, [one.image_id for one in part])
    np.testing.assert_allclose(list(scores.figures.values()), expected.stats, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_no_detection_at_all_is_ap_zero(tmp_path: Path, kind: Kind) -> None:
    content, results = random_data(5)
    path = written(content, tmp_path)
    nothing = [ImageResult(one.image_id, one.size) for one in results]
    scores = Annotations(path).score(tabulate(nothing), kind)
    assert scores.ap == 0
    assert scores.figures["AR100"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_images_changes_no_digit(tmp_path: Path, kind: Kind) -> None:
    content, results = random_data(6)
    annotations = Annotations(written(content, tmp_path))
    one_way, other_way = tabulate(results), tabulate(results[::-1])
    assert annotations.score(one_way, kind).figures == annotations.score(other_way, kind).figures


@pytest.mark.parametrize("kind", KINDS)
def test_matches_give_the_ap_again(tmp_path: Path, kind: Kind) -> None:
    content, results = random_data(7)
    annotations = Annotations(written(content, tmp_path))
    matches = annotations.matches(tabulate(results), kind)
    ones = np.ones((1, len(results)))
    assert average_precision(matches, ones)[0] == pytest.approx(
        annotations.score(tabulate(results), kind).ap, abs=1e-6
    )


def test_a_weighed_image_counts_as_often_as_its_weight(tmp_path: Path) -> None:
    content, results = random_data(8, images=15)
    results.sort(key=lambda result: result.image_id)
    annotations = Annotations(written(content, tmp_path))
    weights = np.random.default_rng(0).integers(0, 3, len(results))
    weighed = average_precision(
        annotations.matches(tabulate(results), "mask"), weights[None].astype(float)
    )
    repeated, more = {**content, "images": [], "annotations": []}, []
    for place, result in enumerate(results):
        for copy in range(weights[place]):
            key = result.image_id * 10 + copy
            image = next(one for one in content["images"] if one["id"] == result.image_id)
            repeated["images"].append({**image, "id": key})
            repeated["annotations"] += [
                {**one, "image_id": key, "id": one["id"] * 10 + copy}
                for one in content["annotations"]
                if one["image_id"] == result.image_id
            ]
            values = {**vars(result), "image_id": key}
            more.append(ImageResult(**values))
    # Copies lie next to each other among equal scores in one, image by image in the other.
    expected = Annotations(written(repeated, tmp_path)).score(tabulate(more), "mask").ap
    assert weighed[0] == pytest.approx(expected, abs=0.02)


def synthetic_matches(seed: int, images: int, classes: int) -> list[Matches]:
    """A data set's matching: frequent and rare classes, good and bad images."""
    rng = np.random.default_rng(seed)
    quality = rng.normal(0, 0.7, images)
    thresholds = np.arange(0.5, 1, 0.05) * 0.9
    result = []
    for rank in range(1, classes + 1):
        objects = np.where(rng.random(images) < 0.6 / rank**0.7, 1 + rng.poisson(2, images), 0)
        wrong = rng.poisson(0.3, images)
        places = np.repeat(np.arange(images), objects)
        places = places[rng.random(len(places)) < 0.9]
        strength = rng.normal(0.3, 0.8) + quality[places] + rng.normal(0, 1, len(places))
        overlap = 1 / (1 + np.exp(-strength))
        scores = np.concatenate(
            [strength + rng.normal(0, 0.8, len(places)), rng.normal(-1, 1, wrong.sum())]
        )
        found = np.concatenate(
            [overlap > thresholds[:, None], np.zeros((10, wrong.sum()), bool)], axis=1
        )
        order = np.argsort(-scores)
        everything = np.concatenate([places, np.repeat(np.arange(images), wrong)])[order]
        result.append(
            Matches(everything, found[:, order], np.ones_like(found), objects.astype(float))
        )
    return result


def part_of(matches: list[Matches], chosen: np.ndarray) -> list[Matches]:
    place = np.full(len(matches[0].objects), -1)
    place[chosen] = np.arange(len(chosen))
    return [
        Matches(
            place[one.images][place[one.images] >= 0],
            one.found[:, place[one.images] >= 0],
            one.counted[:, place[one.images] >= 0],
            one.objects[chosen],
        )
        for one in matches
    ]


def coverage(images: int, part: int, classes: int, rounds: int) -> float:
    """How often the 95% interval of a random part holds the AP of the whole; four data sets."""
    rng = np.random.default_rng(5)
    held = 0
    for seed in range(4):
        matches = synthetic_matches(seed, images, classes)
        whole = average_precision(matches, np.ones((1, images)))[0]
        for round_ in range(rounds // 4):
            part_matches = part_of(matches, rng.permutation(images)[:part])
            interval = bootstrap(part_matches, images, [0.95], seed=round_, replicates=300)[0]
            held += interval.low <= whole <= interval.high
    return held / rounds


def test_the_interval_is_honest() -> None:
    assert 0.93 <= coverage(images=600, part=120, classes=8, rounds=400) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(("part", "classes"), [(120, 20), (200, 20), (300, 40)])
def test_the_interval_is_honest_for_rare_classes_too(part: int, classes: int) -> None:
    assert 0.93 <= coverage(images=1000, part=part, classes=classes, rounds=400) <= 0.97


def test_an_interval_closes_as_the_part_becomes_the_whole() -> None:
    matches = synthetic_matches(2, 200, 5)
    whole = average_precision(matches, np.ones((1, 200)))[0]
    interval = bootstrap(matches, 200, [0.95])[0]
    assert (interval.low, interval.high) == pytest.approx((whole, whole))
    wider = bootstrap(matches, 2000, [0.95, 0.99])
    assert wider[1].low < wider[0].low < wider[0].high < wider[1].high
