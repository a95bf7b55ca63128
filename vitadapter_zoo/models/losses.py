"""The training losses of Mask R-CNN (arXiv:1703.06870, section 3), computed as in the original.

Weights and averages are those of mmdet 2.25 with the configuration ``mask_rcnn_r50_fpn``. All
losses are computed in float32, under autocast too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vitadapter_zoo.images import NetworkInput
from vitadapter_zoo.models.boxes import (
    ANCHOR_RATIOS,
    ANCHOR_SCALE,
    ROI_STRIDES,
    anchor_grids,
    at_least_float32,
    encode,
    pool_rois,
)
from vitadapter_zoo.models.constants import uploaded, uploaded_pixels
from vitadapter_zoo.models.heads import BOX_STDS, RPN_STDS, RPN_STRIDES, RoIHead
from vitadapter_zoo.models.objects import Objects, Target, read_targets
from vitadapter_zoo.models.targets import (
    BACKGROUND,
    IGNORED,
    ROI_MATCHING,
    ROI_SAMPLING,
    RPN_MATCHING,
    RPN_SAMPLING,
    Sample,
    Sampling,
    assign,
    mask_targets,
    take_all,
)
from vitadapter_zoo.models.targets import (
    sample as draw,
)

if TYPE_CHECKING:
    from vitadapter_zoo.models.mask_rcnn import MaskRCNN

TRAINING_CANDIDATES = 2000  # proposals per level before suppression; 1000 are kept after it

# A function that gets the result of `assign` and chooses the boxes that a loss uses.
Choose: TypeAlias = Callable[[Tensor, Sampling], Sample]


def losses(
    model: MaskRCNN,
    inputs: Sequence[NetworkInput],
    targets: Sequence[Target],
    *,
    sample: bool = True,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Compute the five losses of a batch, with gradients.

    The network's mode does not change. In evaluation mode BatchNorm layers use their running
    statistics and stochastic depth drops no block. Leave crowd regions out of ``targets``: the
    original neither trains on them nor ignores boxes that overlap them (``ignore_iof_thr=-1``).

    Args:
        model: the detector.
        inputs: from ``model.preprocess``. Images of different padded sizes are padded with zeros
            at the bottom and right to the largest size.
        targets: one per image with ``boxes`` ``[n, 4]`` (x1, y1, x2, y2; network pixels),
            ``labels`` int64 ``[n]``, and ``masks``: bool ``[n, H, W]`` of the image's own padded
            size, or for each object COCO polygons in network pixels or a COCO RLE. An image may
            have no objects.
        sample: draw 256 anchors and ``model.roi_head.regions`` proposals (512 as published) per
            image, as in training. With False the losses
            use every anchor and every proposal, and nothing is random.
        generator: the random generator for sampling, on the network's device. The default is the
            device's global generator, which ``torch.manual_seed`` seeds.

    Returns:
        Scalars ``loss_rpn_cls``, ``loss_rpn_bbox``, ``loss_cls``, ``loss_bbox`` and ``loss_mask``.
        Their sum is the training loss.

    Raises:
        ValueError: no images, or targets that do not fit the images or each other.
    """
    weights = next(model.parameters())
    objects = read_targets(targets, inputs, len(model.categories), weights.device)
    x = uploaded_pixels(padded_batch(inputs), weights)
    maps = model.neck(model.backbone(x))
    outputs = model.rpn_head(maps)

    sizes = [item.resized for item in inputs]

    def choose(assigned: Tensor, sampling: Sampling) -> Sample:
        return draw(assigned, sampling, generator) if sample else take_all(assigned)

    padded = [_size(item) for item in inputs]
    rpn = rpn_losses(outputs, objects, padded, choose, model.rpn_head.anchor_scale)
    proposals = model.rpn_head.select(
        [(logits.detach(), deltas.detach()) for logits, deltas in outputs],
        sizes,
        TRAINING_CANDIDATES,
    )
    taken = Sampling(model.roi_head.regions, model.roi_head.regions // 4)
    regions = sample_regions([found.boxes for found in proposals], objects, choose, taken)
    return rpn | roi_losses(model.roi_head, maps[: len(ROI_STRIDES)], regions, objects)


def padded_batch(inputs: Sequence[NetworkInput]) -> Tensor:
    """Join the images in one tensor ``[N, 3, H, W]``, padded with zeros to the largest size.

    Raises:
        ValueError: no images.
    """
    if not inputs:
        raise ValueError("a batch needs at least one image")
    sizes = {_size(item) for item in inputs}
    if len(sizes) == 1:
        return torch.cat([item.tensor for item in inputs])
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    batch = inputs[0].tensor.new_zeros(len(inputs), 3, height, width)
    for image, item in zip(batch, inputs, strict=True):
        image[:, : item.tensor.shape[2], : item.tensor.shape[3]] = item.tensor[0]
    return batch


def _size(item: NetworkInput) -> tuple[int, int]:
    height, width = item.tensor.shape[-2:]
    return height, width


def rpn_losses(
    outputs: list[tuple[Tensor, Tensor]],
    objects: list[Objects],
    sizes: list[tuple[int, int]],
    choose: Choose,
    anchor_scale: int = ANCHOR_SCALE,
) -> dict[str, Tensor]:
    """Compute the proposal head's losses.

    They are the binary cross-entropy of the anchors' scores and the L1 distance of the positive
    anchors' deltas. Both are divided by the number of chosen anchors in the whole batch. As in the
    original, an image without a positive (or without a negative) anchor counts as if it had one.

    Args:
        outputs: logits ``[N, 3, H, W]`` and deltas ``[N, 12, H, W]`` per level.
        objects: the objects of each image.
        sizes: (height, width) of each image's own padded input; anchors outside it are ignored.
        choose: selects the anchors.
        anchor_scale: side of the square anchor in strides.
    """
    logits = at_least_float32(
        torch.cat([part.permute(0, 2, 3, 1).flatten(1) for part, _ in outputs], dim=1)
    )
    deltas = at_least_float32(
        torch.cat(
            [part.permute(0, 2, 3, 1).reshape(len(part), -1, 4) for _, part in outputs], dim=1
        )
    )
    grids = tuple((part.shape[2], part.shape[3]) for part, _ in outputs)
    boxes = torch.cat(anchor_grids(grids, RPN_STRIDES, logits.device, anchor_scale))
    own, _ = _padded([it.boxes for it in objects])
    assigned = assign(boxes, own, RPN_MATCHING, _valid(grids, sizes, logits.device))
    chosen = choose(assigned, RPN_SAMPLING)
    places = _flat(chosen.indices, len(boxes))
    scores = logits.flatten().index_select(0, places).view_as(chosen.taken)
    errors = F.binary_cross_entropy_with_logits(
        scores, chosen.positive.to(scores.dtype), reduction="none"
    )
    offsets = deltas.flatten(0, 1).index_select(0, places).view(*chosen.indices.shape, 4)
    if own.shape[1]:
        owners = assigned.gather(1, chosen.indices).clamp(min=0)
        wanted = own.take_along_dim(owners[..., None], dim=1)
        offsets = offsets - encode(boxes[chosen.indices], wanted, RPN_STDS)
    positives = chosen.positive.sum(dim=1)
    negatives = chosen.taken.sum(dim=1) - positives
    total = (positives.clamp(min=1) + negatives.clamp(min=1)).sum()
    return {
        "loss_rpn_cls": torch.where(chosen.taken, errors, 0.0).sum() / total,
        "loss_rpn_bbox": torch.where(chosen.positive[..., None], offsets.abs(), 0.0).sum() / total,
    }


def _padded(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Join boxes ``[n, 4]`` of each image in one tensor, padded with boxes of zeros.

    Returns:
        The boxes ``[N, n, 4]``, and bool ``[N, n]``, which of them are not padding.
    """
    counts = uploaded([len(part) for part in parts], parts[0].new_empty(0, dtype=torch.int64))
    boxes = pad_sequence(parts, batch_first=True)
    return boxes, torch.arange(boxes.shape[1], device=boxes.device) < counts[:, None]


def _flat(indices: Tensor, length: int) -> Tensor:
    """Turn indices ``[N, S]`` into rows of ``length`` entries into indices of all rows in turn."""
    rows = torch.arange(len(indices), device=indices.device)[:, None]
    return (indices + rows * length).flatten()


def _valid(
    grids: tuple[tuple[int, int], ...], sizes: list[tuple[int, int]], device: torch.device
) -> Tensor | None:
    """Return whether each anchor's centre is inside its image, ``[N, A]``; None if all are."""
    if all(-(-size[axis] // RPN_STRIDES[0]) >= grids[0][axis] for size in sizes for axis in (0, 1)):
        return None
    flags = []
    like = torch.empty(0, dtype=torch.int64, device=device)
    for (height, width), stride in zip(grids, RPN_STRIDES, strict=True):
        limits = uploaded([-(-side // stride) for size in sizes for side in size], like)
        rows, columns = limits.view(-1, 2, 1).unbind(1)
        inside = (torch.arange(height, device=device) < rows)[:, :, None] & (
            torch.arange(width, device=device) < columns
        )[:, None, :]
        flags.append(inside[..., None].expand(-1, -1, -1, len(ANCHOR_RATIOS)).flatten(1))
    return torch.cat(flags, dim=1)


class Regions(NamedTuple):
    """The proposals of a batch that train the box head and the mask head.

    Attributes:
        rois: ``[R, 5]`` as (image index, x1, y1, x2, y2) in network pixels.
        owners: int64 ``[R]``, the index of the object that each proposal belongs to, counted over
            the whole batch, or ``BACKGROUND``.
        positives: how many regions of each image belong to objects; None if that is not known yet.
    """

    rois: Tensor
    owners: Tensor
    positives: list[int] | None = None


def sample_regions(
    proposals: list[Tensor],
    objects: list[Objects],
    choose: Choose,
    sampling: Sampling = ROI_SAMPLING,
) -> Regions:
    """Choose the proposals for training. The objects' own boxes are candidates too.

    Args:
        proposals: boxes ``[P, 4]`` per image, network pixels.
        objects: the objects of each image.
        choose: selects the proposals.
        sampling: the number of proposals per image.
    """
    own, present = _padded([it.boxes for it in objects])
    boxes, existing = _padded(proposals)
    themselves = torch.arange(own.shape[1], device=own.device).expand(len(own), -1)
    matched = torch.cat([themselves, assign(boxes, own, ROI_MATCHING)], dim=1)
    matched = matched.masked_fill(~torch.cat([present, existing], dim=1), IGNORED)
    boxes = torch.cat([own, boxes], dim=1)
    chosen = choose(matched, sampling)
    # On a GPU this is the only wait of the losses beside one for each image's suppression.
    numbers = torch.stack([chosen.taken.sum(dim=1), chosen.positive.sum(dim=1)]).tolist()
    kept = _true(chosen.taken.flatten(), sum(numbers[0]))
    places = _flat(chosen.indices, boxes.shape[1])[kept]
    images = kept // chosen.indices.shape[1]
    counts = present.sum(dim=1)
    before = counts.cumsum(0) - counts
    owners = matched.flatten()[places]
    return Regions(
        torch.cat([images[:, None].to(boxes.dtype), boxes.flatten(0, 1)[places]], dim=1),
        torch.where(owners >= 0, owners + before[images], BACKGROUND),
        numbers[1],
    )


def _true(flags: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` flags that are True; ``nonzero`` would wait for them."""
    return flags.to(torch.uint8).argsort(descending=True, stable=True)[:count]


def roi_losses(
    head: RoIHead, maps: list[Tensor], regions: Regions, objects: list[Objects]
) -> dict[str, Tensor]:
    """Compute the losses of the box head and the mask head.

    They are the cross-entropy of the classes, the L1 distance of the box deltas and the binary
    cross-entropy of the masks. The first two are divided by the number of regions, including
    background. The third is the mean over all pixels of the positive regions' masks. Without
    positive regions the last two are zero and have a zero gradient, because distributed training
    needs a gradient for every parameter.

    Args:
        head: the box head and the mask head.
        maps: the neck's maps at strides 4, 8, 16 and 32.
        regions: from `sample_regions`.
        objects: the objects of each image.
    """
    rois, owners, counts = regions
    if counts is None:
        images = rois[owners >= 0, 0].long()
        counts = torch.bincount(images, minlength=len(objects)).tolist()
    logits, deltas = head.bbox_head(pool_rois(maps, rois, 7, head.finest_scale))
    number = max(len(rois), 1)
    background = logits.shape[1] - 1
    # The last entry is the background class, because BACKGROUND is index -1.
    labels = torch.cat([*(own.labels for own in objects), uploaded([background], owners)])[owners]
    positives = _true(owners >= 0, sum(counts))
    boxes, owners, classes = rois[positives], owners[positives], labels[positives]
    wanted = encode(boxes[:, 1:], torch.cat([own.boxes for own in objects])[owners], BOX_STDS)
    found = at_least_float32(deltas).view(len(rois), background, 4)[positives, classes]
    masks = at_least_float32(head.mask_head(pool_rois(maps, boxes, 14, head.finest_scale), classes))
    shapes = _shapes(objects, boxes, owners, counts)
    return {
        "loss_cls": F.cross_entropy(at_least_float32(logits), labels, reduction="sum") / number,
        "loss_bbox": (found - wanted).abs().sum() / number,
        "loss_mask": F.binary_cross_entropy_with_logits(masks, shapes, reduction="sum")
        / max(masks.numel(), 1),
    }


def _shapes(objects: list[Objects], rois: Tensor, owners: Tensor, counts: list[int]) -> Tensor:
    """Return the mask targets ``[P, 28, 28]`` of positive regions, which are ordered by image."""
    shapes = []
    before = 0
    for own, boxes, numbers in zip(
        objects, rois[:, 1:].split(counts), owners.split(counts), strict=True
    ):
        shapes.append(mask_targets(own.masks, numbers - before, boxes))
        before += len(own.boxes)
    return torch.cat(shapes)
