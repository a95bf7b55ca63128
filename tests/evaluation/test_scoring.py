from pathlib import Path

import numpy as np
import pytest
from coco_oracle import by_pycocotools, random_data, written

from vitadapter_zoo.evaluation.bootstrap import average_precision, bootstrap
from vitadapter_zoo.evaluation.dataset import Dataset, read_dataset
from vitadapter_zoo.evaluation.run import ImageResult
from vitadapter_zoo.evaluation.scoring import FIGURES, KINDS, Annotations, Kind, Matches, Scores


def read(path: Path) -> Dataset:
    return read_dataset(path, path.parent)


def score(path: Path, results: list[ImageResult], kind: Kind) -> Scores:
    annotations = Annotations(read(path))
    return annotations.score(annotations.tabulate(results), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("seed", "crowded"), [(0, False), (1, False), (2, False), (3, True)])
def test_every_figure_is_the_one_of_pycocotools(
    tmp_path: Path, seed: int, crowded: bool, kind: Kind
) -> None:
    content, results = random_data(seed, crowded=crowded, images=12 if crowded else 30)
    path = written(content, tmp_path)
    scores = score(path, results, kind)
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
    scores = score(path, part, kind)
    expected = by_pycocotools(path, part, kind, [one.image_id for one in part])
    np.testing.assert_allclose(list(scores.figures.values()), expected.stats, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_no_detection_at_all_is_ap_zero(tmp_path: Path, kind: Kind) -> None:
    content, results = random_data(5)
    path = written(content, tmp_path)
    nothing = [ImageResult(one.image_id, one.size) for one in results]
    scores = score(path, nothing, kind)
    assert scores.ap == 0
    assert scores.figures["AR100"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_images_changes_no_digit(tmp_path: Path, kind: Kind) -> None:
    content, results = random_data(6)
    annotations = Annotations(read(written(content, tmp_path)))
    one_way, other_way = annotations.tabulate(results), annotations.tabulate(results[::-1])
    assert annotations.score(one_way, kind).figures == annotations.score(other_way, kind).figures


@pytest.mark.parametrize("kind", KINDS)
def test_matches_give_the_ap_again(tmp_path: Path, kind: Kind) -> None:
    content, results = random_data(7)
    annotations = Annotations(read(written(content, tmp_path)))
    matches = annotations.matches(annotations.tabulate(results), kind)
    ones = np.ones((1, len(results)))
    assert average_precision(matches, ones)[0] == pytest.approx(
        annotations.score(annotations.tabulate(results), kind).ap, abs=1e-6
    )


def test_a_weighed_image_counts_as_often_as_its_weight(tmp_path: Path) -> None:
    content, results = random_data(8, images=15)
    results.sort(key=lambda result: result.image_id)
    annotations = Annotations(read(written(content, tmp_path)))
    weights = np.random.default_rng(0).integers(0, 3, len(results))
    weighed = average_precision(
        annotations.matches(annotations.tabulate(results), "mask"), weights[None].astype(float)
    )
    repeated, more = {**content, "images": [], "annotations": []}, []
    for place, result in enumerate(results):
        for copy in range(weights[place]):
            key = int(result.image_id) * 10 + copy
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
    expected = score(written(repeated, tmp_path), more, "mask").ap
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


@pytest.mark.parametrize("rounds", [160, pytest.param(400, marks=pytest.mark.slow)])
def test_the_interval_is_honest(rounds: int) -> None:
    assert 0.93 <= coverage(images=600, part=120, classes=8, rounds=rounds) <= 0.97


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
