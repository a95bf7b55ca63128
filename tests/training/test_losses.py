"""Tests of the losses: against the original's outputs, plain-loop rules and finite differences."""

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from ellipses import ellipses
from PIL import Image
from torch import Tensor, nn

from vitadapter_zoo import Detections, MaskRCNN, get_row
from vitadapter_zoo.catalog import COCO_CLASSES
from vitadapter_zoo.images import NetworkInput
from vitadapter_zoo.models import build
from vitadapter_zoo.models.boxes import anchors, encode
from vitadapter_zoo.models.heads import RPN_STRIDES, RoIHead
from vitadapter_zoo.models.losses import (
    Regions,
    padded_batch,
    roi_losses,
    rpn_losses,
    sample_regions,
)
from vitadapter_zoo.models.objects import Objects, as_bitmaps
from vitadapter_zoo.models.targets import (
    BACKGROUND,
    IGNORED,
    RPN_MATCHING,
    Sample,
    Sampling,
    assign,
    take_all,
)
from vitadapter_zoo.ops.library import implementation
from vitadapter_zoo.training import losses

DATA = Path(__file__).parents[1] / "data"
NAMES = ["loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"]


def target(boxes: list[list[float]], labels: list[int], size: tuple[int, int]) -> dict[str, Tensor]:
    corners = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    return {
        "boxes": corners,
        "labels": torch.tensor(labels, dtype=torch.int64),
        "masks": ellipses(corners, size),
    }


def prepared(height: int, width: int, seed: int = 0) -> NetworkInput:
    """Create a random network input of the given padded size with 10 columns of padding."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.zeros(1, 3, height, width)
    tensor[..., : width - 10] = torch.randn(1, 3, height, width - 10, generator=generator)
    resized = (height, width - 10)
    return NetworkInput(tensor, resized, resized, (1.0, 1.0, 1.0, 1.0))


@pytest.fixture(scope="module")
def nano() -> MaskRCNN:
    """A narrow detector with random weights for small images; tests must not change it."""
    torch.manual_seed(0)
    row = replace(get_row("adapter-n-emoji"), input_size=(64, 40))
    model = build(row, COCO_CLASSES)
    with torch.no_grad():
        model.get_parameter("roi_head.bbox_head.fc_cls.bias")[0] += 3  # to have some detections
    return model.eval()


@pytest.fixture
def trainable(nano: MaskRCNN) -> MaskRCNN:
    """A copy of the detector that a test may change."""
    return copy.deepcopy(nano)


def choose_all(assigned: Tensor, sampling: Sampling) -> Sample:
    return take_all(assigned)


# Comparison with the original's stored values


@pytest.mark.parametrize("operator", ["compiled", "reference"])
def test_losses_and_gradients_agree_with_the_original(
    operator: str, standin_model: Callable[[str], MaskRCNN], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = np.load(DATA / "training" / "adapter-t-deit-3x.npz")
    model = standin_model("adapter-t-deit-3x").requires_grad_()
    item = model.preprocess(DATA / "rocket.jpg")
    size = (item.tensor.shape[2], item.tensor.shape[3])
    objects = target(stored["gt_boxes"].tolist(), stored["gt_labels"].tolist(), size)
    monkeypatch.setenv("VITADAPTER_ZOO_OP", operator)
    implementation.cache_clear()
    try:
        found = losses(model, [item], [objects], sample=False)
        torch.stack(list(found.values())).sum().backward()
    finally:
        implementation.cache_clear()

    assert list(found) == NAMES
    for name, loss in found.items():
        assert loss.item() == pytest.approx(float(stored[f"loss/{name}"]), rel=1e-4), name
    norms = {
        name: float(cast("Tensor", parameter.grad).double().norm())
        for name, parameter in model.named_parameters()
    }
    expected = {
        name.removeprefix("gradnorm/"): float(stored[name])
        for name in stored
        if name.startswith("gradnorm/")
    }
    assert norms == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert not model.training


def test_ground_truth_boxes_are_added_to_the_proposals() -> None:
    size = (64, 64)
    first = Objects(*target([[0, 0, 30, 30]], [1], size).values())
    second = Objects(*target([[9, 9, 40, 40], [20, 20, 60, 60]], [1, 2], size).values())
    nothing = torch.zeros(0, 4)
    far = torch.tensor([[50.0, 0, 60, 10]])
    rois, owners, _ = sample_regions([far, nothing], [first, second], choose_all)
    assert owners.tolist() == [0, BACKGROUND, 1, 2]
    assert rois[:, 0].tolist() == [0, 0, 1, 1]
    assert torch.equal(rois[2:, 1:], second.boxes)


# Gradients compared with finite differences


def double_objects(boxes: list[list[float]], labels: list[int]) -> Objects:
    found = Objects(*target(boxes, labels, (64, 64)).values())
    return found._replace(boxes=found.boxes.double())


@pytest.mark.parametrize("loss", ["loss_rpn_cls", "loss_rpn_bbox"])
def test_gradients_of_the_proposal_losses(loss: str) -> None:
    torch.manual_seed(0)
    shapes = [(64 // stride, 64 // stride) for stride in RPN_STRIDES]
    outputs = [
        torch.randn(2, channels, *shape, dtype=torch.float64, requires_grad=True)
        for shape in shapes
        for channels in (3, 12)
    ]
    objects = [double_objects([[3, 5, 40, 38], [30, 30, 62, 60]], [0, 1]), double_objects([], [])]

    def compute(*parts: Tensor) -> Tensor:
        pairs = list(zip(parts[::2], parts[1::2], strict=True))
        return rpn_losses(pairs, objects, [(64, 64), (64, 32)], choose_all)[loss]

    assert compute(*outputs) > 0
    assert torch.autograd.gradcheck(compute, outputs, fast_mode=True)


@pytest.mark.parametrize("loss", ["loss_cls", "loss_bbox", "loss_mask"])
def test_gradients_of_the_region_losses(loss: str) -> None:
    torch.manual_seed(0)
    head = RoIHead(3, 16, 32).double()
    width = head.mask_head.upsample.in_channels
    maps = [
        torch.randn(2, width, 64 // stride, 64 // stride, dtype=torch.float64).requires_grad_()
        for stride in (4, 8, 16, 32)
    ]
    objects = [double_objects([[3, 5, 40, 38], [30, 30, 62, 60]], [0, 1]), double_objects([], [])]
    regions = Regions(
        torch.tensor(
            [[0, 4, 4, 41, 40], [0, 28, 31, 60, 64], [0, 9, 9, 20, 20], [1, 5, 5, 50, 40]],
            dtype=torch.float64,
        ),
        torch.tensor([0, 1, BACKGROUND, BACKGROUND]),
    )
    biases = [
        head.get_parameter(f"{name}.bias").requires_grad_()
        for name in ("bbox_head.fc_cls", "bbox_head.fc_reg", "mask_head.conv_logits")
    ]

    def compute(*_: Tensor) -> Tensor:
        return roi_losses(head, maps, regions, objects)[loss]

    assert compute() > 0
    assert torch.autograd.gradcheck(compute, [*maps, *biases], fast_mode=True, atol=1e-6)


# Batches


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


def test_anchors_outside_the_image_s_padded_size_are_ignored() -> None:
    torch.manual_seed(0)
    size = (64, 96)  # padded size of the image; the batch is 128 x 128
    grids = [(-(-128 // stride), -(-128 // stride)) for stride in RPN_STRIDES]
    outputs = [(torch.randn(1, 3, *grid), torch.randn(1, 12, *grid)) for grid in grids]
    objects = Objects(*target([[10, 10, 60, 60], [50, 20, 94, 50]], [0, 1], size).values())
    found = rpn_losses(outputs, [objects], [size], choose_all)

    # The original's rule: a cell counts if its index is below the padded size / stride, rounded up.
    logits, deltas, boxes = [], [], []
    for (height, width), stride, (scores, offsets) in zip(grids, RPN_STRIDES, outputs, strict=True):
        rows, columns = -(-size[0] // stride), -(-size[1] // stride)
        grid = anchors(height, width, stride, torch.device("cpu")).view(height, width, 3, 4)
        boxes.append(grid[:rows, :columns].reshape(-1, 4))
        logits.append(scores[0, :, :rows, :columns].permute(1, 2, 0).flatten())
        offsets = offsets[0, :, :rows, :columns].permute(1, 2, 0)
        deltas.append(offsets.reshape(-1, 4))
    inside = torch.cat(boxes)
    assigned = assign(inside, objects.boxes, RPN_MATCHING)
    counted, positive = assigned != IGNORED, assigned >= 0
    errors = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.cat(logits), positive.float(), reduction="none"
    )
    wanted = encode(inside[positive], objects.boxes[assigned[positive]], (1, 1, 1, 1))
    distance = (torch.cat(deltas)[positive] - wanted).abs().sum()
    number = counted.sum()
    torch.testing.assert_close(found["loss_rpn_cls"], errors[counted].sum() / number)
    torch.testing.assert_close(found["loss_rpn_bbox"], distance / number)


def test_an_image_without_positive_anchors_counts_as_if_it_had_one() -> None:
    grids = [(64 // stride, 64 // stride) for stride in RPN_STRIDES]
    outputs = [(torch.zeros(2, 3, *grid), torch.zeros(2, 12, *grid)) for grid in grids]
    objects = [Objects(*target([], [], (64, 64)).values())] * 2
    found = rpn_losses(outputs, objects, [(64, 64)] * 2, choose_all)
    number = sum(3 * height * width for height, width in grids)
    expected = np.log(2) * number / (number + 1)
    assert found["loss_rpn_cls"].item() == pytest.approx(expected, rel=1e-6)


def test_a_batch_s_region_losses_are_those_of_its_images() -> None:
    torch.manual_seed(0)
    size = (64, 64)
    head = RoIHead(3, 16, 32)
    maps = [torch.randn(2, 16, 64 // stride, 64 // stride) for stride in (4, 8, 16, 32)]
    objects = [
        Objects(*target([[3, 5, 40, 38], [30, 30, 62, 60]], [0, 1], size).values()),
        Objects(
            *target([[0, 0, 30, 60], [20, 2, 60, 30], [9, 9, 30, 30]], [2, 1, 0], size).values()
        ),
    ]
    proposals = [torch.tensor([[5.0, 6, 44, 40], [1, 1, 9, 9]]), torch.tensor([[21.0, 4, 60, 33]])]

    def compute(images: list[int]) -> tuple[dict[str, Tensor], int, int]:
        own = [objects[image] for image in images]
        regions = sample_regions([proposals[image] for image in images], own, choose_all)
        found = roi_losses(head, [level[images] for level in maps], regions, own)
        return found, len(regions.rois), int((regions.owners >= 0).sum())

    (first, *counts), (second, *others), (both, *_) = compute([0]), compute([1]), compute([0, 1])
    assert (counts, others) == ([4, 3], [4, 4])
    for name, (a, b) in {"loss_cls": (4, 4), "loss_bbox": (4, 4), "loss_mask": (3, 4)}.items():
        expected = (a * first[name] + b * second[name]) / (a + b)
        torch.testing.assert_close(both[name], expected)


# Randomness, precision and synchronised BatchNorm


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


# Calling the detector


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


# Targets


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
