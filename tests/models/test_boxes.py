"""Boxes in the network: suppression, pasted masks and pooled regions."""

import torch
import torchvision

from vitadapter_zoo.models.boxes import nms_by_group, paste_masks, pool_rois


def test_pasting_a_box_touches_only_its_region() -> None:
    torch.manual_seed(0)
    probabilities = torch.rand(4, 28, 28)
    boxes = torch.tensor(
        [
            [1.5, 2.25, 30.0, 19.0],
            [-5.0, -5.0, 8.0, 9.0],
            [20.0, 10.0, 50.0, 40.0],
            [4.0, 4.0, 4.0, 9.0],
        ]
    )
    masks = paste_masks(probabilities, boxes, (24, 32), 0.5)
    # The whole-image way: every pixel centre in the box's own -1..1 frame.
    y, x = torch.meshgrid(torch.arange(24) + 0.5, torch.arange(32) + 0.5, indexing="ij")
    for mask, probability, (x1, y1, x2, y2) in zip(masks[:3], probabilities, boxes, strict=False):
        grid = torch.stack([(x - x1) / (x2 - x1) * 2 - 1, (y - y1) / (y2 - y1) * 2 - 1], dim=-1)
        whole = torch.nn.functional.grid_sample(
            probability[None, None], grid[None], align_corners=False
        )
        assert torch.equal(mask, whole[0, 0] >= 0.5)
    assert masks[:3].any(dim=(1, 2)).all()


def test_suppression_is_within_groups() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [50, 50, 60, 60]])
    scores = torch.tensor([0.6, 0.9, 0.7, 0.1])
    groups = torch.tensor([0, 0, 1, 0])
    assert nms_by_group(boxes, scores, groups, 0.5).tolist() == [1, 2, 3]
    assert nms_by_group(boxes[:0], scores[:0], groups[:0], 0.5).tolist() == []


def test_suppression_of_many_boxes_is_suppression_in_one_pass() -> None:
    torch.manual_seed(0)
    corners = torch.rand(3000, 2) * 80
    boxes = torch.cat([corners, corners + torch.rand(3000, 2) * 40 + 2], dim=1)
    scores = (torch.rand(3000) * 200).round() / 200  # with ties
    groups = torch.randint(5, (3000,))
    apart = boxes + (groups * (boxes.max() + 1))[:, None]
    expected = torchvision.ops.nms(apart, scores, 0.7)
    assert 100 < len(expected) < 2900
    assert nms_by_group(boxes, scores, groups, 0.7).tolist() == expected.tolist()


def test_rois_are_pooled_from_the_level_of_their_size() -> None:
    maps = [torch.full((1, 1, 800 // s, 800 // s), float(s)) for s in (4, 8, 16, 32)]
    sides = (449, 10, 225, 111, 790, 113, 447, 223)
    rois = torch.tensor([[0, 5, 5, 5 + side, 5 + side] for side in sides], dtype=torch.float32)
    expected = torch.tensor([32.0, 4, 16, 4, 32, 8, 16, 8])
    for with_gradients in (False, True):
        with torch.set_grad_enabled(with_gradients):
            pooled = pool_rois(maps, rois, 7)
        torch.testing.assert_close(pooled[:, 0, 3, 3], expected)


def test_a_region_that_is_nan_pools_nothing() -> None:
    maps = [torch.ones(1, 1, 64 // s, 64 // s) for s in (4, 8, 16, 32)]
    rois = torch.tensor([[0, 5, 5, 50, 50], [0, 5, float("nan"), 50, 50]])
    for with_gradients in (False, True):
        with torch.set_grad_enabled(with_gradients):
            assert pool_rois(maps, rois, 7).sum(dim=(1, 2, 3)).tolist() == [49, 0]
