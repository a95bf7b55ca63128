"""Training targets of the heads: matching boxes to objects, sampling boxes, mask targets.

The rules are those of the original's configuration (mmdet 2.25, ``mask_rcnn_r50_fpn``). The outputs
of matching and sampling have fixed shapes, so the CPU never waits for the GPU.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

from vitadapter_zoo.models.constants import uploaded

BACKGROUND = -1
IGNORED = -2
MASK_SIZE = 28
# Pairs of an object and a box that are compared at once; a batch with more is assigned image by
# image. Four float32 tensors of this size exist at a time.
MOST_PAIRS = 2**25


class Matching(NamedTuple):
    """Thresholds on the intersection over union of a box and an object, 0..1.

    Attributes:
        positive: a box with at least this overlap belongs to the object that it overlaps most.
        negative: a box with less overlap is background; between the two it is ignored.
        low_quality: the best boxes of an object belong to it if their overlap is at least this.
    """

    positive: float
    negative: float
    low_quality: float


RPN_MATCHING = Matching(positive=0.7, negative=0.3, low_quality=0.3)
ROI_MATCHING = Matching(positive=0.5, negative=0.5, low_quality=0.5)


class Sampling(NamedTuple):
    """How many boxes of an image the loss uses.

    Attributes:
        number: boxes per image.
        positives: the largest number of them that may belong to objects.
    """

    number: int
    positives: int


RPN_SAMPLING = Sampling(number=256, positives=128)
ROI_SAMPLING = Sampling(number=512, positives=128)


class Sample(NamedTuple):
    """The boxes that a loss may use: tensors ``[..., S]`` with one entry per candidate box.

    The number of entries is fixed, so some of the candidates may not be taken.

    Attributes:
        indices: index of the box, int64.
        taken: whether the loss uses the box, bool.
        positive: whether the loss uses the box and it belongs to an object, bool.
    """

    indices: Tensor
    taken: Tensor
    positive: Tensor


def overlaps(objects: Tensor, boxes: Tensor) -> Tensor:
    """Compute the IoU ``[..., n, A]`` of ``objects`` ``[..., n, 4]`` and ``boxes`` ``[..., A, 4]``.

    Boxes without area overlap nothing.
    """
    objects, boxes = objects[..., :, None, :], boxes[..., None, :, :]
    widths = torch.minimum(objects[..., 2], boxes[..., 2]) - torch.maximum(
        objects[..., 0], boxes[..., 0]
    )
    heights = torch.minimum(objects[..., 3], boxes[..., 3]) - torch.maximum(
        objects[..., 1], boxes[..., 1]
    )
    shared = widths.clamp_(min=0).mul_(heights.clamp_(min=0))
    return shared / (_areas(objects) + _areas(boxes)).sub_(shared).clamp_(min=1e-6)


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def assign(
    boxes: Tensor, objects: Tensor, matching: Matching, valid: Tensor | None = None
) -> Tensor:
    """Assign each box to an object, to the background or to neither, as ``MaxIoUAssigner`` does.

    An object also gets every box that overlaps it as much as its best box does, even if this
    box overlaps another object more. If several objects claim a box this way, the last gets it.

    Args:
        boxes: ``[A, 4]`` in network pixels, or ``[N, A, 4]`` if each image has its own.
        objects: ``[n, 4]``, the boxes of the objects, or ``[N, n, 4]`` for a batch. Boxes of zeros
            fill the places of images that have fewer objects; nothing is assigned to them.
        matching: the thresholds.
        valid: bool ``[A]`` or ``[N, A]``, False for boxes to ignore; None if all are valid.

    Returns:
        int64 ``[A]`` or ``[N, A]``: the object's index, ``BACKGROUND`` or ``IGNORED``.
    """
    batch, (count, number) = objects.shape[:-2], (objects.shape[-2], boxes.shape[-2])
    if count == 0 or number == 0:
        assigned = torch.full((*batch, number), BACKGROUND, device=boxes.device)
        return assigned if valid is None else assigned.masked_fill_(~valid, IGNORED)
    if batch and batch[0] > 1 and batch[0] * count * number > MOST_PAIRS:
        one_by_one = [
            assign(
                boxes if boxes.dim() == 2 else boxes[image],
                objects[image],
                matching,
                None if valid is None else valid[image],
            )
            for image in range(batch[0])
        ]
        return torch.stack(one_by_one)
    shares = overlaps(objects, boxes)
    if valid is not None:
        shares.masked_fill_(~valid[..., None, :], -1)
    largest, assigned = shares.max(dim=-2)
    assigned.masked_fill_(largest < matching.positive, IGNORED)
    assigned.masked_fill_((largest >= 0) & (largest < matching.negative), BACKGROUND)
    best = shares.amax(dim=-1, keepdim=True)
    numbers = torch.arange(count, dtype=torch.int32, device=boxes.device)[:, None]
    is_best = (shares == best) & (best >= matching.low_quality)
    owner = torch.where(is_best, numbers, IGNORED).amax(dim=-2)
    return torch.where(owner >= 0, owner, assigned)


def sample(assigned: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Sample:
    """Choose boxes of each image at random as mmdet's ``RandomSampler`` does.

    Positive boxes come first. Background boxes fill the remaining places.

    Args:
        assigned: from `assign`, ``[..., A]``.
        sampling: the numbers of boxes.
        generator: on the device of ``assigned``; by default that device's global generator, which
            ``torch.manual_seed`` seeds.
    """
    keys = torch.rand(
        assigned.shape, generator=generator, dtype=torch.float32, device=assigned.device
    )
    number = assigned.shape[-1]
    positives = torch.where(assigned >= 0, keys, -1.0).topk(min(sampling.positives, number))
    positive = positives.values >= 0
    background = torch.where(assigned == BACKGROUND, keys, -1.0).topk(min(sampling.number, number))
    places = torch.arange(background.values.shape[-1], device=assigned.device)
    left = sampling.number - positive.sum(dim=-1, keepdim=True)
    taken = (background.values >= 0) & (places < left)
    return Sample(
        indices=torch.cat([positives.indices, background.indices], dim=-1),
        taken=torch.cat([positive, taken], dim=-1),
        positive=torch.cat([positive, torch.zeros_like(taken)], dim=-1),
    )


def take_all(assigned: Tensor) -> Sample:
    """Choose every box that is not ignored; ``assigned`` is ``[..., A]``."""
    indices = torch.arange(assigned.shape[-1], device=assigned.device).expand_as(assigned)
    return Sample(indices, taken=assigned != IGNORED, positive=assigned >= 0)


def mask_targets(masks: Tensor, owners: Tensor, boxes: Tensor) -> Tensor:
    """Crop each box's mask and resize it to 28 x 28 pixels (Mask R-CNN, section 3).

    Args:
        masks: bool ``[n, H, W]`` of the padded network size.
        owners: int64 ``[P]``, the index of each box's mask.
        boxes: ``[P, 4]`` in network pixels.

    Returns:
        ``[P, 28, 28]`` of zeros and ones in the dtype of ``boxes``.
    """
    if len(boxes) == 0:
        return boxes.new_zeros(0, MASK_SIZE, MASK_SIZE)
    height, width = masks.shape[1:]
    inside = boxes.clamp(min=0).minimum(uploaded([width, height, width, height], boxes))
    rois = torch.cat([owners[:, None].to(inside), inside], dim=1)
    pooled = torchvision_roi_align(
        masks[:, None].to(boxes), rois, MASK_SIZE, 1.0, sampling_ratio=-1, aligned=True
    )
    return (pooled.squeeze(1) >= 0.5).to(boxes)
