import json

import numpy as np
import pytest
import standins
import torch
import torchvision
from hotcoco import mask as coco_mask
from PIL import Image

from vitadapter_zoo import Detections, MaskRCNN, ZooError
from vitadapter_zoo.catalog import COCO_CATEGORY_IDS, COCO_CLASSES
from vitadapter_zoo.models.boxes import nms_by_group, paste_masks, pool_rois


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


def test_predict_returns_plain_cpu_tensors_in_image_pixels(tiny: MaskRCNN) -> None:
    one, two = tiny.predict([standins.PHOTO, str(standins.PHOTO)], batch_size=2)
    assert one.boxes.dtype == one.scores.dtype == torch.float32
    assert one.masks.dtype == torch.bool
    assert one.masks.shape == (len(one), 427, 640)
    assert (one.scores > 0.05).all()
    assert (one.scores.diff() <= 0).all()
    torch.testing.assert_close(one.scores, two.scores, rtol=1e-3, atol=1e-3)
    assert len(tiny.predict(standins.PHOTO, score_threshold=0.9)[0]) < len(one)
    assert tiny.predict([]) == []


def test_predict_checks_its_options(tiny: MaskRCNN) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        tiny.predict(standins.PHOTO, batch_size=0)
    with pytest.raises(ValueError, match="score_threshold"):
        tiny.predict(standins.PHOTO, score_threshold=5)


def test_nothing_found_is_an_empty_result(tiny: MaskRCNN) -> None:
    found = tiny.predict(standins.PHOTO, score_threshold=1.0)[0]
    assert len(found) == 0
    assert found.masks.shape == (0, 427, 640)
    assert found.to_coco(1) == []


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
