"""Box geometry: anchors, box coding, non-maximum suppression and RoI pooling.

Boxes are float32 ``[N, 4]`` as (x1, y1, x2, y2). The order of the arithmetic is that of the
original code: close to a threshold, rounding decides whether a box is kept.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms
from torchvision.ops import roi_align as torchvision_roi_align

from vitadapter_zoo.models.constants import constant, kept, uploaded
from vitadapter_zoo.ops import roi_align as compiled_roi_align
from vitadapter_zoo.ops.masks import paste_masks as paste_masks

ANCHOR_SCALE = 8  # side of the square anchor in strides
ANCHOR_RATIOS = (0.5, 1.0, 2.0)  # height / width
MAX_LOG_RATIO = abs(math.log(16 / 1000))  # limit of |dw| and |dh| before exp
FINEST_SCALE = 56  # FPN paper, equation 1 with k0 = 4 at 224 pixels: level 0 below 112
ROI_STRIDES = (4, 8, 16, 32)
MANY_BOXES = 1000  # from this number on, suppression by group is faster on the CPU


def anchors(
    height: int, width: int, stride: int, device: torch.device, scale: int = ANCHOR_SCALE
) -> Tensor:
    """Return the anchors of one level, ``[height * width * 3, 4]`` in network pixels.

    They are in the order of row, column and ratio. ``scale`` is the side of the square anchor in
    strides.
    """
    ratios = torch.tensor(ANCHOR_RATIOS, dtype=torch.float32, device=device).sqrt()
    half_width = 0.5 * scale * stride / ratios
    half_height = 0.5 * scale * stride * ratios
    base = torch.stack([-half_width, -half_height, half_width, half_height], dim=-1)
    y, x = torch.meshgrid(
        torch.arange(height, device=device) * stride,
        torch.arange(width, device=device) * stride,
        indexing="ij",
    )
    centres = torch.stack([x, y, x, y], dim=-1).view(-1, 1, 4)
    return (base + centres).view(-1, 4)


@kept(8)
def anchor_grids(
    shapes: tuple[tuple[int, int], ...],
    strides: tuple[int, ...],
    device: torch.device,
    scale: int = ANCHOR_SCALE,
) -> tuple[Tensor, ...]:
    """Return the `anchors` of every level; ``shapes`` are the (height, width) of the maps."""
    return tuple(
        anchors(height, width, stride, device, scale)
        for (height, width), stride in zip(shapes, strides, strict=True)
    )


def decode(
    boxes: Tensor, deltas: Tensor, stds: tuple[float, float, float, float], limits: Tensor
) -> Tensor:
    """Apply box deltas and clip the boxes to the image.

    Args:
        boxes: ``[..., N, 4]`` in network pixels.
        deltas: ``[..., N, 4]`` as (dx, dy, dw, dh) in units of ``stds``.
        stds: the scale of each delta.
        limits: the largest coordinates, from `box_limits`.
    """
    return apply_deltas(boxes, deltas, stds).clamp(min=0).minimum(limits)


def box_limits(sizes: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """Return the largest box coordinates of each image, float32 ``[N, 1, 4]``.

    Args:
        sizes: (height, width) of the resized images without their padding.
        like: a tensor on the device of the boxes.
    """
    rows = [side for height, width in sizes for side in (width, height, width, height)]
    return uploaded(rows, like.new_empty(0, dtype=torch.float32)).view(-1, 1, 4)


def apply_deltas(boxes: Tensor, deltas: Tensor, stds: tuple[float, float, float, float]) -> Tensor:
    """Apply box deltas (R-CNN, arXiv:1311.2524, appendix C) without clipping; see `decode`."""
    deltas = deltas * constant(stds, deltas.dtype, deltas.device)
    centres = (boxes[..., :2] + boxes[..., 2:]) * 0.5
    sides = boxes[..., 2:] - boxes[..., :2]
    centres = centres + sides * deltas[..., :2]
    sides = sides * deltas[..., 2:].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return torch.cat([centres - sides * 0.5, centres + sides * 0.5], dim=-1)


def encode(boxes: Tensor, targets: Tensor, stds: tuple[float, float, float, float]) -> Tensor:
    """Compute the deltas with which `decode` turns ``boxes`` into ``targets``.

    Args:
        boxes: ``[..., N, 4]`` in network pixels.
        targets: ``[..., N, 4]`` in network pixels.
        stds: the scale of each delta.

    Returns:
        ``[..., N, 4]`` as (dx, dy, dw, dh) in units of ``stds``.
    """
    sides = boxes[..., 2:] - boxes[..., :2]
    shifts = (targets[..., :2] + targets[..., 2:]) * 0.5 - (boxes[..., :2] + boxes[..., 2:]) * 0.5
    growth = (targets[..., 2:] - targets[..., :2]) / sides
    units = constant(stds, boxes.dtype, boxes.device)
    return torch.cat([shifts / sides, growth.log()], dim=-1) / units


def nms_by_group(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    threshold: float,
    valid: Tensor | None = None,
) -> Tensor:
    """Suppress overlapping boxes within each group; return the kept indices, best score first.

    Each group is shifted by its own offset, as in the original. The rounding of the shifted
    coordinates is part of the published results. torchvision's ``batched_nms`` is not used because
    it changes its algorithm with the number of boxes. No coordinate and no score may be negative.

    Args:
        boxes: ``[N, 4]``.
        scores: ``[N]``.
        groups: int64 ``[N]``.
        threshold: the IoU from which a box is suppressed.
        valid: bool ``[N]``; the result is that of the valid boxes alone. None if all are.
    """
    if valid is not None and boxes.device.type != "cpu":
        return _nms_of_valid(boxes, scores, groups, threshold, valid)
    if valid is not None:
        chosen = valid.nonzero().squeeze(1)
        return chosen[nms_by_group(boxes[chosen], scores[chosen], groups[chosen], threshold)]
    if boxes.numel() == 0:
        return torch.zeros(0, dtype=torch.long, device=boxes.device)
    boxes = boxes + (groups.to(boxes) * (boxes.max() + 1))[:, None]
    if boxes.device.type != "cpu" or len(boxes) < MANY_BOXES:
        return nms(boxes, scores, threshold)
    # The CPU kernel compares all pairs of boxes. Boxes of different groups never overlap, so a call
    # per group gives the same result with fewer comparisons.
    kept = []
    for group in groups.unique().tolist():
        members = (groups == group).nonzero().squeeze(1)
        kept.append(members[nms(boxes[members], scores[members], threshold)])
    best = torch.cat(kept).sort().values
    return best[scores[best].argsort(descending=True, stable=True)]


def _nms_of_valid(
    boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float, valid: Tensor
) -> Tensor:
    """`nms_by_group` without selecting the valid boxes first, for which the CPU would wait.

    The invalid boxes, and one more, become the same box with the lowest score, apart from all
    others. Suppression keeps one of them, the last.
    """
    boxes = boxes.masked_fill(~valid[:, None], 0)
    side = F.pad(boxes.flatten(), (0, 1)).max() + 1  # the padding: there may be no box
    boxes = boxes + (groups.to(boxes) * side)[:, None]
    apart = F.pad(boxes.flatten(), (0, 1)).max() + side
    corner = torch.stack([apart, apart, apart + side, apart + side])
    boxes = torch.where(F.pad(valid, (0, 1))[:, None], F.pad(boxes, (0, 0, 0, 1)), corner)
    scores = F.pad(scores.masked_fill(~valid, -1), (0, 1), value=-1)
    return nms(boxes, scores, threshold)[:-1]


def pool_rois(
    maps: list[Tensor], rois: Tensor, size: int, finest_scale: int = FINEST_SCALE
) -> Tensor:
    """Apply RoIAlign to each box on the level that fits the box's size.

    Args:
        maps: ``[N, 256, H / s, W / s]`` at strides 4, 8, 16 and 32.
        rois: ``[R, 5]`` as (image index, x1, y1, x2, y2) in network pixels.
        size: bins per side.
        finest_scale: boxes below twice this size in pixels are pooled at stride 4.

    Returns:
        ``[R, 256, size, size]``.
    """
    # A box of NaN becomes a box without area, which pools zeros.
    rois = rois.masked_fill(rois.isnan().any(dim=1, keepdim=True), 0)
    scales = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
    levels = (scales / finest_scale + 1e-6).log2().floor().clamp(0, len(ROI_STRIDES) - 1)
    if rois.device.type != "cpu":
        return _pool_without_waiting(maps, rois, levels, size)
    order = levels.argsort(stable=True)
    counts = levels.long().bincount(minlength=len(ROI_STRIDES)).tolist()
    levels_of = zip(maps, order.split(counts), rois[order].split(counts), ROI_STRIDES, strict=True)
    if not torch.is_grad_enabled() and _pools_into(maps[0]):
        pooled = maps[0].new_empty(len(rois), size, size, maps[0].shape[1])
        for x, rows, part, stride in levels_of:
            compiled_roi_align.roi_align_into(pooled, rows, x, part, 1 / stride)
        return pooled.permute(0, 3, 1, 2)
    # Always in float32: boxes rounded to half precision would pool from another place.
    parts = [
        roi_align(at_least_float32(x), part, size, 1 / stride).to(x.dtype).permute(0, 2, 3, 1)
        for x, _, part, stride in levels_of
    ]
    # The mask head's convolutions are fastest on channels-last tensors.
    return torch.cat(parts).index_select(0, order.argsort()).permute(0, 3, 1, 2)


def _pools_into(x: Tensor) -> bool:
    """Return whether `compiled_roi_align.roi_align_into` takes maps like this one."""
    return x.dtype in (torch.float32, torch.bfloat16) and compiled_roi_align.usable()


def _pool_without_waiting(maps: list[Tensor], rois: Tensor, levels: Tensor, size: int) -> Tensor:
    """`pool_rois` without counting the boxes of each level, for which the CPU would wait.

    Each level pools all boxes, those of other levels as boxes without area: they take no samples
    and pool zeros.
    """
    parts = (
        torchvision_roi_align(
            at_least_float32(x),
            rois.masked_fill((levels != level)[:, None], 0),
            size,
            1 / stride,
            -1,
            aligned=True,
        )
        for level, (x, stride) in enumerate(zip(maps, ROI_STRIDES, strict=True))
    )
    pooled = next(parts)
    for part in parts:
        pooled = pooled + part
    return pooled.to(maps[0].dtype).contiguous(memory_format=torch.channels_last)


def at_least_float32(x: Tensor) -> Tensor:
    """Convert ``x`` to float32 if it has half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def roi_align(x: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
    """RoIAlign (arXiv:1703.06870, section 3), aligned, with an adaptive number of samples.

    On the CPU torchvision first copies the whole map out of its channels-last order, then loops
    over single channels. The compiled kernel processes all channels at once. If the kernel is
    missing and no gradients are needed, PyTorch's ``embedding_bag`` computes each bin as a weighted
    sum of pixels. This is 4 to 10 times as fast as torchvision.

    Args:
        x: ``[N, C, H, W]``, float32 or float64.
        rois: ``[R, 5]`` as (image index, x1, y1, x2, y2) in network pixels.
        size: bins per side.
        scale: cells of the map per network pixel.

    Returns:
        ``[R, C, size, size]``.
    """
    on_cpu = x.device.type == "cpu"
    if on_cpu and x.dtype == torch.float32 and compiled_roi_align.usable():
        return compiled_roi_align.roi_align(x, rois, size, scale)
    if not on_cpu or x.requires_grad:
        return torchvision_roi_align(x, rois, size, scale, -1, aligned=True)
    channels, height, width = x.shape[1:]
    pixels = x.permute(0, 2, 3, 1).reshape(-1, channels)
    starts = rois[:, 1:3] * scale - 0.5
    bins = (rois[:, 3:5] * scale - 0.5 - starts) / size
    samples = bins.ceil().clamp(min=0).long()  # per bin along x and y
    pooled = x.new_empty(len(rois), size, size, channels)
    for samples_x, samples_y in samples.unique(dim=0).tolist():
        group = (samples == samples.new_tensor([samples_x, samples_y])).all(1).nonzero().squeeze(1)
        if samples_x * samples_y == 0:  # a box without area pools zeros
            pooled[group] = 0
            continue
        columns, x_shares = _samples(starts[group, 0], bins[group, 0], size, samples_x, width)
        rows, y_shares = _samples(starts[group, 1], bins[group, 1], size, samples_y, height)
        rows = rows + rois[group, 0].long()[:, None, None] * height
        places = rows[:, :, None, :, None] * width + columns[:, None, :, None, :]
        shares = y_shares[:, :, None, :, None] * x_shares[:, None, :, None, :]
        pooled[group] = F.embedding_bag(
            places.flatten(3).flatten(0, 2),
            pixels,
            mode="sum",
            per_sample_weights=shares.flatten(3).flatten(0, 2),
        ).view(-1, size, size, channels)
    return pooled.permute(0, 3, 1, 2)


def _samples(
    starts: Tensor, bins: Tensor, size: int, samples: int, limit: int
) -> tuple[Tensor, Tensor]:
    """Return each sample's two neighbouring cells along one axis and their interpolation weights.

    Args:
        starts: where the boxes begin, ``[R]`` in cells.
        bins: the lengths of the boxes' bins, ``[R]`` in cells.
        size: bins per box.
        samples: samples per bin.
        limit: cells of the map along this axis; samples more than one cell outside have weight 0.

    Returns:
        Cell indices and weights, both ``[R, size, 2 * samples]``.
    """
    bins = bins[:, None, None]
    offsets = (torch.arange(samples, dtype=bins.dtype, device=bins.device) + 0.5) * bins / samples
    numbers = torch.arange(size, dtype=bins.dtype, device=bins.device)[:, None]
    places = starts[:, None, None] + numbers * bins + offsets
    inside = (places >= -1) & (places <= limit)
    places = places.clamp(0, limit - 1)
    lower = places.floor()
    upper = (lower + 1).clamp(max=limit - 1)
    share = places - lower
    shares = torch.stack([1 - share, share], dim=-1) * (inside.to(share.dtype) / samples)[..., None]
    return torch.stack([lower, upper], dim=-1).long().flatten(2), shares.flatten(2)
