"""Tests of the losses: against the original's outputs, plain-loop rules and finite differences."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from operators import switched_to
from targets import NAMES, prepared, target
from torch import Tensor

from vitadapter_zoo import MaskRCNN
from vitadapter_zoo.images import NetworkInput
from vitadapter_zoo.models.boxes import anchors, encode
from vitadapter_zoo.models.heads import RPN_STRIDES, RoIHead
from vitadapter_zoo.models.losses import (
    Regions,
    roi_losses,
    rpn_losses,
    sample_regions,
)
from vitadapter_zoo.models.objects import Objects
from vitadapter_zoo.models.targets import (
    BACKGROUND,
    IGNORED,
    RPN_MATCHING,
    Sample,
    Sampling,
    assign,
    take_all,
)
from vitadapter_zoo.training import losses

DATA = Path(__file__).parents[1] / "data"


def choose_all(assigned: Tensor, sampling: Sampling) -> Sample:
    return take_all(assigned)


# Comparison with the original's stored values


@pytest.mark.parametrize(
    "operator", ["compiled", pytest.param("reference", marks=pytest.mark.slow)]
)
def test_losses_and_gradients_agree_with_the_original(
    operator: str, standin_model: Callable[[str], MaskRCNN], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = np.load(DATA / "training" / "adapter-t-deit-3x.npz")
    model = standin_model("adapter-t-deit-3x").requires_grad_()
    item = model.preprocess(DATA / "rocket.jpg")
    size = (item.tensor.shape[2], item.tensor.shape[3])
    objects = target(stored["gt_boxes"].tolist(), stored["gt_labels"].tolist(), size)
    with switched_to(operator, monkeypatch):
        found, norms = losses_and_norms(model, item, objects)

    assert list(found) == NAMES
    for name, loss in found.items():
        assert loss.item() == pytest.approx(float(stored[f"loss/{name}"]), rel=1e-4), name
    expected = {
        name.removeprefix("gradnorm/"): float(stored[name])
        for name in stored
        if name.startswith("gradnorm/")
    }
    assert norms == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert not model.training


def losses_and_norms(
    model: MaskRCNN, item: NetworkInput, objects: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The losses of one image, and the norm of each parameter's gradient for their sum."""
    model.zero_grad()
    found = losses(model, [item], [objects], sample=False)
    torch.stack(list(found.values())).sum().backward()
    return found, {
        name: float(cast("Tensor", parameter.grad).double().norm())
        for name, parameter in model.named_parameters()
    }


def test_losses_and_gradients_are_the_same_without_the_compiled_operator(
    small: MaskRCNN, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a narrow network; in a published one beside the original in the slow test above."""
    model = copy.deepcopy(small).requires_grad_()
    objects = target([[5, 5, 40, 40], [30, 20, 90, 60]], [3, 0], (64, 96))
    found = []
    for operator in ("compiled", "reference"):
        with switched_to(operator, monkeypatch):
            found.append(losses_and_norms(model, prepared(64, 96), objects))
    (compiled, norms), (reference, other_norms) = found
    for name, loss in compiled.items():
        assert reference[name].item() == pytest.approx(loss.item(), rel=1e-4), name
    assert other_norms == pytest.approx(norms, rel=1e-3, abs=1e-6)


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
