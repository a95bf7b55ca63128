"""What the heads should predict: matching boxes with objects, sampling, mask targets.

The rules are those of the original's configuration (mmdet 2.25, ``mask_rcnn_r50_fpn``). Matching
and sampling have fixed output shapes, so they never wait for a GPU.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

BACKGROUND = -1
IGNORED = -2
MASK_SIZE = 28


class Matching(NamedTuple):
    """Thresholds on the intersection over union of a box and an object, 0..1.

    Attributes:
        positive: from here on a box belongs to the object that it overlaps most.
        negative: below it a box is background; between the two it is ignored.
        low_quality: the best boxes of an object belong to it if their overlap is at least this.
    """

    positive: float
    negative: float
    low_quality: float


RPN_MATCHING = Matching(positive=0.7, negative=0.3, low_quality=0.3)
ROI_MATCHING = Matching(positive=0.5, negative=0.5, low_quality=0.5)


class Sampling(NamedTuple):
    """How many boxes of an image the loss takes.

    Attributes:
        number: boxes per image.
        positives: at most so many of them belong to objects.
    """

    number: int
    positives: int


RPN_SAMPLING = Sampling(number=256, positives=128)
ROI_SAMPLING = Sampling(number=512, positives=128)


class Sample(NamedTuple):
    """Boxes that a loss may take. The tensors have one entry per candidate.

    Attributes:
        indices: which box, int64.
        taken: whether the loss takes it; candidates fill up the fixed number of entries.
        positive: whether it is taken and belongs to an object.
    """

    indices: Tensor
    taken: Tensor
    positive: Tensor


def overlaps(objects: Tensor, boxes: Tensor) -> Tensor:
    """Intersection over union ``[n, A]`` of ``objects`` ``[n, 4]`` and ``boxes`` ``[A, 4]``."""
    objects = objects[:, None]
    widths = torch.minimum(objects[..., 2], boxes[:, 2]) - torch.maximum(
        objects[..., 0], boxes[:, 0]
    )
    heights = torch.minimum(objects[..., 3], boxes[:, 3]) - torch.maximum(
        objects[..., 1], boxes[:, 1]
    )
    shared = widths.clamp_(min=0).mul_(heights.clamp_(min=0))
    return shared / (_areas(objects) + _areas(boxes)).sub_(shared).clamp_(min=1e-6)


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def assign(
    boxes: Tensor, objects: Tensor, matching: Matching, valid: Tensor | None = None
) -> Tensor:
    """Decide which object each box belongs to, as mmdet's ``MaxIoUAssigner``.

    An object also gets all boxes that overlap it as much as its best box does, even if those
    boxes overlap another object more. The last such object wins.

    Args:
        boxes: ``[A, 4]`` in network pixels.
        objects: ``[n, 4]``, the boxes of the objects.
        matching: the thresholds.
        valid: bool ``[A]``; the other boxes are ignored.

    Returns:
        int64 ``[A]``: the object's index, ``BACKGROUND`` or ``IGNORED``.
    """
    if len(objects) == 0 or len(boxes) == 0:
        assigned = torch.full((len(boxes),), BACKGROUND, device=boxes.device)
        return assigned if valid is None else assigned.masked_fill_(~valid, IGNORED)
    shares = overlaps(objects, boxes)
    if valid is not None:
        shares.masked_fill_(~valid, -1)
    largest, assigned = shares.max(dim=0)
    assigned.masked_fill_(largest < matching.positive, IGNORED)
    assigned.masked_fill_((largest >= 0) & (largest < matching.negative), BACKGROUND)
    best = shares.amax(dim=1, keepdim=True)
    numbers = torch.arange(len(objects), dtype=torch.int32, device=boxes.device)[:, None]
    is_best = (shares == best) & (best >= matching.low_quality)
    owner = torch.where(is_best, numbers, IGNORED).amax(dim=0)
    return torch.where(owner >= 0, owner, assigned)


def sample(assigned: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Sample:
    """Choose boxes at random, as mmdet's ``RandomSampler``: positives first, then background.

    Background fills up what positives leave.

    Args:
        assigned: from `assign`, ``[A]``.
        sampling: how many.
        generator: on the device of ``assigned``; by default that device's global generator, which
            ``torch.manual_seed`` seeds.
    """
    keys = torch.rand(
        assigned.shape, generator=generator, dtype=torch.float32, device=assigned.device
    )
    positives = torch.where(assigned >= 0, keys, -1.0).topk(min(sampling.positives, len(keys)))
    positive = positives.values >= 0
    background = torch.where(assigned == BACKGROUND, keys, -1.0).topk(
        min(sampling.number, len(keys))
    )
    places = torch.arange(len(background.values), device=assigned.device)
    taken = (background.values >= 0) & (places < sampling.number - positive.sum())
    return Sample(
        indices=torch.cat([positives.indices, background.indices]),
        taken=torch.cat([positive, taken]),
        positive=torch.cat([positive, torch.zeros_like(taken)]),
    )


def take_all(assigned: Tensor) -> Sample:
    """Every box that is not ignored."""
    indices = torch.arange(len(assigned), device=assigned.device)
    return Sample(indices, taken=assigned != IGNORED, positive=assigned >= 0)


def mask_targets(masks: Tensor, owners: Tensor, boxes: Tensor) -> Tensor:
    """The part of each object's mask inside a box, as 28 x 28 pixels (Mask R-CNN, section 3).

    Args:
        masks: bool ``[n, H, W]`` of the padded network size.
        owners: int64 ``[P]``, the mask that belongs to each box.
        boxes: ``[P, 4]`` in network pixels.

    Returns:
        ``[P, 28, 28]`` of zeros and ones in the dtype of ``boxes``.
    """
    if len(boxes) == 0:
        return boxes.new_zeros(0, MASK_SIZE, MASK_SIZE)
    height, width = masks.shape[1:]
    inside = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
    rois = torch.cat([owners[:, None].to(inside), inside], dim=1)
    pooled = torchvision_roi_align(
        masks[:, None].to(boxes), rois, MASK_SIZE, 1.0, sampling_ratio=-1, aligned=True
    )
    return (pooled.squeeze(1) >= 0.5).to(boxes)
