"""Tests of the training targets: assignment, sampling and mask targets."""

import numpy as np
import pytest
import torch
from ellipses import ellipses

from vitadapter_zoo.models import targets
from vitadapter_zoo.models.boxes import box_limits, decode, encode
from vitadapter_zoo.models.heads import BOX_STDS
from vitadapter_zoo.models.targets import (
    BACKGROUND,
    IGNORED,
    ROI_MATCHING,
    ROI_SAMPLING,
    RPN_MATCHING,
    RPN_SAMPLING,
    Matching,
    Sampling,
    assign,
    mask_targets,
    sample,
    take_all,
)


def assigned_by_loops(
    boxes: list[list[float]], objects: list[list[float]], matching: Matching
) -> list[int]:
    """Assign boxes by the rules of mmdet's ``MaxIoUAssigner`` in plain loops."""

    def overlap(a: list[float], b: list[float]) -> np.float32:
        width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
        height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        shared = np.float32(width * height)
        areas = np.float32((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]))
        return np.float32(shared / (areas - shared))

    table = [[overlap(box, other) for other in objects] for box in boxes]
    result = []
    for row in table:
        if not row or max(row) < np.float32(matching.negative):
            result.append(BACKGROUND)
        elif max(row) >= np.float32(matching.positive):
            result.append(row.index(max(row)))
        else:
            result.append(IGNORED)
    for index in range(len(objects)):
        column = [row[index] for row in table]
        if column and max(column) >= np.float32(matching.low_quality):
            for place, value in enumerate(column):
                if value == max(column):
                    result[place] = index
    return result


@pytest.mark.parametrize("matching", [RPN_MATCHING, ROI_MATCHING])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_boxes_are_assigned_by_the_rules(matching: Matching, count: int) -> None:
    rng = np.random.default_rng(count)
    seen = set()
    for _ in range(20):
        # With integers on a small grid, equal overlaps are frequent and exact in float32.
        corners = rng.integers(0, 8, (60 + count, 2))
        sides = rng.integers(1, 9, (60 + count, 2))
        places = np.concatenate([corners, corners + sides], axis=1).astype(float).tolist()
        boxes, objects = places[:60], places[60:]
        expected = assigned_by_loops(boxes, objects, matching)
        found = assign(torch.tensor(boxes), torch.tensor(objects).view(-1, 4), matching)
        assert found.tolist() == expected
        seen |= {min(value, 0) for value in expected}
    if count:
        assert {0, BACKGROUND} <= seen
        assert (IGNORED in seen) == (matching is RPN_MATCHING)


def test_the_last_object_gets_a_contested_low_quality_match() -> None:
    objects = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 12]])
    # The box overlaps the first object more, and is the best box of both objects.
    assert assign(torch.tensor([[0.0, 0, 10, 10]]), objects, ROI_MATCHING).tolist() == [1]


def test_invalid_anchors_are_ignored_and_are_no_object_s_best_box() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 6], [50, 50, 60, 60]])
    objects = torch.tensor([[0.0, 0, 10, 10]])
    assert assign(boxes, objects, RPN_MATCHING).tolist() == [0, IGNORED, BACKGROUND]
    valid = torch.tensor([False, True, False])
    assert assign(boxes, objects, RPN_MATCHING, valid).tolist() == [IGNORED, 0, IGNORED]
    nothing = assign(boxes, objects[:0], RPN_MATCHING, valid)
    assert nothing.tolist() == [IGNORED, BACKGROUND, IGNORED]
    assert assign(boxes[:0], objects, RPN_MATCHING).tolist() == []


@pytest.mark.parametrize("shared", [True, False])
def test_a_batch_is_assigned_as_its_images_are(
    shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)

    def random_boxes(*shape: int) -> torch.Tensor:
        corners = torch.randint(0, 8, (*shape, 2), generator=generator)
        sides = torch.randint(1, 9, (*shape, 2), generator=generator)
        return torch.cat([corners, corners + sides], dim=-1).float()

    counts = [3, 0, 5]
    boxes = random_boxes(60) if shared else random_boxes(3, 60)
    objects = random_boxes(3, 5)
    for image, count in enumerate(counts):
        objects[image, count:] = 0  # padding
    valid = torch.rand(3, 60, generator=generator) < 0.7
    for flags in (None, valid):
        found = assign(boxes, objects, RPN_MATCHING, flags)
        for image, count in enumerate(counts):
            own = boxes if shared else boxes[image]
            expected = assign(
                own, objects[image, :count], RPN_MATCHING, None if flags is None else flags[image]
            )
            assert torch.equal(found[image], expected)
        with monkeypatch.context() as small:
            small.setattr(targets, "MOST_PAIRS", 10)
            assert torch.equal(assign(boxes, objects, RPN_MATCHING, flags), found)


def test_a_batch_is_sampled_image_by_image() -> None:
    torch.manual_seed(0)
    assigned = torch.tensor([[7] * 50 + [BACKGROUND] * 50, [IGNORED] * 99 + [BACKGROUND]])
    chosen = sample(assigned, Sampling(number=20, positives=5), None)
    assert chosen.positive.sum(dim=1).tolist() == [5, 0]
    assert chosen.taken.sum(dim=1).tolist() == [20, 1]
    assert (assigned.gather(1, chosen.indices)[chosen.positive] == 7).all()
    assert chosen.indices[1, chosen.taken[1]].tolist() == [99]


@pytest.mark.parametrize("sampling", [RPN_SAMPLING, ROI_SAMPLING])
@pytest.mark.parametrize(
    ("positives", "background"), [(500, 5000), (20, 5000), (0, 5000), (500, 60), (3, 4), (0, 0)]
)
def test_sample_sizes_are_the_original_s(
    sampling: Sampling, positives: int, background: int
) -> None:
    torch.manual_seed(positives)
    assigned = torch.tensor([7] * positives + [BACKGROUND] * background + [IGNORED] * 50)
    assigned = assigned[torch.randperm(len(assigned))]
    chosen = sample(assigned, sampling, None)
    taken, positive = chosen.indices[chosen.taken], chosen.indices[chosen.positive]
    expected = min(positives, sampling.positives)
    assert len(positive) == expected
    assert len(taken) == expected + min(background, sampling.number - expected)
    assert len(taken.unique()) == len(taken)
    assert (assigned[positive] == 7).all()
    others = chosen.indices[chosen.taken & ~chosen.positive]
    assert (assigned[others] == BACKGROUND).all()


def test_constants_are_those_of_the_original_configuration() -> None:
    assert RPN_MATCHING == (0.7, 0.3, 0.3)
    assert ROI_MATCHING == (0.5, 0.5, 0.5)
    assert RPN_SAMPLING == (256, 128)
    assert ROI_SAMPLING == (512, 128)


def test_sampling_is_uniform() -> None:
    torch.manual_seed(0)
    assigned = torch.tensor([0] * 20 + [BACKGROUND] * 30)
    counts = torch.zeros(50)
    for _ in range(2000):
        chosen = sample(assigned, Sampling(number=15, positives=5), None)
        counts[chosen.indices[chosen.taken]] += 1
    assert counts.sum() == 2000 * 15
    torch.testing.assert_close(counts[:20], torch.full((20,), 500.0), rtol=0.15, atol=0)
    torch.testing.assert_close(counts[20:], torch.full((30,), 2000 / 3), rtol=0.15, atol=0)


def test_take_all_chooses_every_box_that_is_not_ignored() -> None:
    chosen = take_all(torch.tensor([IGNORED, BACKGROUND, 0, 3]))
    assert chosen.taken.tolist() == [False, True, True, True]
    assert chosen.positive.tolist() == [False, False, True, True]


def test_encode_is_the_inverse_of_decode() -> None:
    torch.manual_seed(0)
    boxes, wanted = (
        torch.cat([corner, corner + sides], dim=1)
        for corner, sides in ((torch.rand(50, 2) * 60, torch.rand(50, 2) * 30 + 5) for _ in "ab")
    )
    deltas = encode(boxes, wanted, BOX_STDS)
    limits = box_limits([(100, 100)], boxes)[0]
    torch.testing.assert_close(decode(boxes, deltas, BOX_STDS, limits), wanted)


def test_mask_targets_are_cropped_to_the_box() -> None:
    boxes = torch.tensor([[8.0, 8, 36, 36], [4, 20, 60, 48]])
    masks = ellipses(boxes, (64, 64))
    inner = torch.tensor([[8.0, 8, 36, 36], [4, 20, 60, 48], [50, 50, 63, 63], [8, -9, 36, 36]])
    found = mask_targets(masks, torch.tensor([0, 1, 0, 0]), inner)
    assert found.shape == (4, 28, 28)
    assert torch.equal(found[0].bool(), masks[0, 8:36, 8:36])  # one pixel per bin
    # With two pixels per bin along x, a bin is their mean; 0.5 belongs to the object.
    pairs = masks[1, 20:48, 4:60].float().view(28, 28, 2).mean(2)
    assert torch.equal(found[1], (pairs >= 0.5).float())
    assert not found[2].any()
    clipped = mask_targets(masks, torch.tensor([0]), torch.tensor([[8.0, 0, 36, 36]]))
    assert torch.equal(found[3], clipped[0])
    assert mask_targets(masks, torch.zeros(0).long(), torch.zeros(0, 4)).shape == (0, 28, 28)
