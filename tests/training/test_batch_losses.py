"""Losses of a detector for batches: sizes, objects, randomness and precision, and bad targets."""

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from targets import NAMES, prepared, target
from torch import Tensor, nn

from vitadapter_zoo import Detections, MaskRCNN
from vitadapter_zoo.models.losses import (
    padded_batch,
)
from vitadapter_zoo.models.objects import as_bitmaps
from vitadapter_zoo.training import losses


def assert_gradients(model: nn.Module, found: dict[str, Tensor]) -> None:
    """Assert that every parameter has a finite gradient."""
    torch.stack(list(found.values())).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_images_without_objects(trainable: MaskRCNN) -> None:
    items = [prepared(64, 64), prepared(64, 64, seed=1)]
    found = losses(trainable, items, [target([], [], (64, 64))] * 2)
    assert list(found) == NAMES
    assert found["loss_rpn_cls"] > 0
    assert found["loss_cls"] > 0
    for name in ("loss_rpn_bbox", "loss_bbox", "loss_mask"):
        assert found[name] == 0
    assert_gradients(trainable, found)


def test_one_image_with_objects_and_one_without(trainable: MaskRCNN) -> None:
    items = [prepared(64, 64), prepared(64, 64, seed=1)]
    own = target([[5, 5, 40, 40]], [3], (64, 64))
    found = losses(trainable, items, [target([], [], (64, 64)), own])
    assert all(loss > 0 for loss in found.values())
    assert_gradients(trainable, found)


def test_images_of_several_sizes_are_padded_at_the_bottom_and_right(trainable: MaskRCNN) -> None:
    items = [prepared(64, 96), prepared(96, 64, seed=1)]
    batch = padded_batch(items)
    assert batch.shape == (2, 3, 96, 96)
    assert torch.equal(batch[0, :, :64], items[0].tensor[0])
    assert torch.equal(batch[1, :, :, :64], items[1].tensor[0])
    assert not batch[0, :, 64:].any()
    assert not batch[1, :, :, 64:].any()
    objects = [
        target([[5, 5, 40, 40]], [3], (64, 96)),
        target([[5, 5, 40, 90], [1, 1, 30, 30]], [79, 0], (96, 64)),
    ]
    assert_gradients(trainable, losses(trainable, items, objects))


def test_sampling_is_reproducible_by_seed_or_generator(nano: MaskRCNN) -> None:
    items = [prepared(64, 96)]
    objects = [target([[5, 5, 40, 40]], [3], (64, 96))]

    def once(**options: Any) -> list[float]:
        return [loss.item() for loss in losses(nano, items, objects, **options).values()]

    torch.manual_seed(0)
    first, second = once(), once()
    assert first != second
    torch.manual_seed(0)
    assert once() == first
    assert once(generator=torch.Generator().manual_seed(5)) == once(
        generator=torch.Generator().manual_seed(5)
    )
    assert once(sample=False) == once(sample=False)


def test_losses_are_float32_under_autocast(nano: MaskRCNN) -> None:
    items = [prepared(64, 96)]
    objects = [target([[5, 5, 40, 40]], [3], (64, 96))]
    exact = losses(nano, items, objects, sample=False)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = losses(nano, items, objects, sample=False)
    for name, loss in rounded.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact[name], rtol=0.05, atol=0.01)


def test_batch_norms_can_be_synchronised(trainable: MaskRCNN) -> None:
    items = [prepared(64, 96)]
    objects = [target([[5, 5, 40, 40]], [3], (64, 96))]
    both = []
    for model in (trainable, nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(trainable))):
        model.train()
        for module in model.modules():  # stochastic depth is random
            if type(module).__name__ == "DropPath":
                module.eval()
        # In a single process they compute the same as ordinary BatchNorm layers.
        torch.manual_seed(0)
        both.append(losses(model, items, objects))
        assert_gradients(model, both[-1])
    assert both[0] == both[1]


def picture() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 64, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def test_the_detector_returns_losses_in_training_mode(trainable: MaskRCNN) -> None:
    trainable.train()
    item = trainable.preprocess(picture())
    own = target([[5, 5, 30, 30]], [3], (item.tensor.shape[2], item.tensor.shape[3]))
    torch.manual_seed(0)
    from_image = trainable([picture()], [own])
    assert list(from_image) == NAMES
    assert_gradients(trainable, from_image)
    torch.manual_seed(0)
    assert trainable([item], [own]) == from_image
    assert trainable.training
    with pytest.raises(ValueError, match=r"got no targets.*model\.eval\(\)"):
        trainable([item])
    with pytest.raises(ValueError, match="got no targets"):
        trainable([item], 0.5)


def test_the_detector_detects_in_evaluation_mode(nano: MaskRCNN) -> None:
    item = nano.preprocess(picture())
    with torch.inference_mode():
        many, few = nano([item], 0.05)[0], nano([item], 0.6)[0]
        default, also = nano([item])[0], nano([item], [target([], [], (64, 64))])[0]
    assert isinstance(many, Detections)
    assert len(also) == len(default)
    assert len(few) < len(many)


def test_masks_may_be_polygons_or_rle() -> None:
    square = torch.zeros(40, 60, dtype=torch.bool)
    square[10:20, 5:25] = True
    corners = [5, 10, 25, 10, 25, 20, 5, 20]
    runs = [5 * 40 + 10, *([10, 30] * 19), 10]
    forms: list[Any] = [
        square,
        [corners],
        corners,
        {"size": [40, 60], "counts": [*runs, 60 * 40 - sum(runs)]},
    ]
    for form in forms:
        assert torch.equal(as_bitmaps([form], (40, 60)), square[None])
    assert torch.equal(as_bitmaps(forms, (40, 60)), square.expand(4, -1, -1))
    two_parts = [corners, [40, 0, 50, 0, 50, 10, 40, 10]]
    assert as_bitmaps([two_parts], (40, 60)).sum() == 300
    assert as_bitmaps([], (40, 60)).shape == (0, 40, 60)
    from hotcoco import mask as coco_mask

    compressed = coco_mask.encode(np.asfortranarray(square.numpy().astype(np.uint8)))
    assert torch.equal(as_bitmaps([compressed], (40, 60)), square[None])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": None}, "boxes missing"),
        ({"boxes": [[5, 5, 5, 30]]}, "x1 < x2.*leave out objects without area"),
        ({"boxes": [[5, 5, float("nan"), 30]]}, "x1 < x2"),
        ({"boxes": [[5, 5, float("inf"), 30]]}, "x1 < x2"),
        ({"labels": [80]}, r"0\.\.79, got \[80\]"),
        ({"labels": [-1]}, r"0\.\.79"),
        ({"labels": [0.5]}, "integers"),
        ({"labels": [1, 2]}, "each box needs a label and a mask: got 1 boxes"),
        ({"masks": torch.zeros(1, 20, 20)}, r"padded network size, \[n, 64, 96\]"),
        ({"masks": []}, "each box needs a label and a mask"),
        ({"masks": [{"size": [9, 9], "counts": [81]}]}, "RLE must have the padded"),
        ({"masks": ["a"]}, "a mask must be a bool tensor"),
    ],
)
def test_targets_that_do_not_fit_are_refused(
    nano: MaskRCNN, change: dict[str, Any], message: str
) -> None:
    good: dict[str, Any] = target([[5, 5, 40, 40]], [3], (64, 96))
    bad = {key: value for key, value in (good | change).items() if value is not None}
    with pytest.raises(ValueError, match=rf"targets\[1\]: .*{message}"):
        losses(nano, [prepared(64, 96)] * 2, [good, bad])


def test_a_batch_needs_images_and_one_target_per_image(nano: MaskRCNN) -> None:
    with pytest.raises(ValueError, match="each image needs a target: got 1 images and 0 targets"):
        losses(nano, [prepared(64, 96)], [])
    with pytest.raises(ValueError, match="at least one image"):
        losses(nano, [], [])
