"""The detector as one graph: what `MaskRCNN.detect` computes, in operators that can be exported.

Differences from ``models``: shapes that depend on the image are results of operators instead of
Python numbers, the size of the input is fixed, and there is one image per call. The layers and
their weights are those of the model.
"""

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms
from torchvision.ops import roi_align as torchvision_roi_align

from vitadapter_zoo.models import MaskRCNN
from vitadapter_zoo.models.adapter import POINTS, MSDeformAttn
from vitadapter_zoo.models.boxes import ROI_STRIDES, decode
from vitadapter_zoo.models.heads import (
    BOX_NMS,
    BOX_STDS,
    MAX_DETECTIONS,
    PROPOSALS,
    RPN_NMS,
    RPN_STRIDES,
)
from vitadapter_zoo.ops.reference import locate

INPUTS = ("image", "size", "score_threshold")
OUTPUTS = ("boxes", "scores", "labels", "masks")
# What the check after an export compares besides the outputs.
STAGES = (
    *(f"backbone.{index}" for index in range(4)),
    *(f"neck.{index}" for index in range(len(RPN_STRIDES))),
    "proposals",
    "proposal_scores",
)


class _Boxes(NamedTuple):
    """Boxes ``[N, 4]`` in network pixels with scores ``[N]`` in 0..1, best first."""

    boxes: Tensor
    scores: Tensor


class Exportable(nn.Module):
    """A detector for images of one size.

    The arguments of its call are those of `INPUTS`, its results those of `OUTPUTS` and, with
    ``stages``, of `STAGES`.

    Args:
        model: the detector; it is not changed, and its weights are shared.
        size: (height, width) of the input in pixels, multiples of 32.
        decomposed: compute deformable attention by ``grid_sample``, which other runtimes know,
            instead of this package's operator.
        stages: return the stages too.
    """

    def __init__(
        self, model: MaskRCNN, size: tuple[int, int], *, decomposed: bool, stages: bool
    ) -> None:
        super().__init__()
        values = model.state_dict(keep_vars=True).values()
        shared: dict[int, Any] = {id(value): value for value in values}
        self.model = copy.deepcopy(model, shared).eval()
        self.stages = stages
        if decomposed:
            _decompose(self.model.backbone, size)

    def forward(self, image: Tensor, size: Tensor, score_threshold: Tensor) -> tuple[Tensor, ...]:
        """Detect objects in one image.

        Args:
            image: float32 ``[1, 3, H, W]``, normalised RGB, zero-padded.
            size: float32 ``[2]``, (height, width) of the image without its padding.
            score_threshold: float32 ``[1]``, lowest score of a detection, 0..1.

        Returns:
            Boxes float32 ``[N, 4]`` in network pixels, scores float32 ``[N]``, labels int64
            ``[N]``, mask probabilities float32 ``[N, 28, 28]``, and the stages where wanted.
        """
        model = self.model
        features = model.backbone(image.to(next(model.parameters()).dtype))
        maps = model.neck(list(features))
        limits = torch.cat([size.flip(0), size.flip(0)])
        proposals = self._propose(maps, limits)
        boxes, scores, labels = self._detect(maps, proposals, limits, score_threshold)
        masks = self._masks(maps, boxes, labels)
        found = (boxes, scores, labels, masks)
        if not self.stages:
            return found
        return (*found, *(x.float() for x in (*features, *maps)), *proposals)

    def _propose(self, maps: list[Tensor], limits: Tensor) -> _Boxes:
        """See `suppressed`."""
        head = self.model.rpn_head
        candidates = head.candidates(head(maps), limits)
        solid = candidates.solid[0].nonzero().squeeze(1)
        boxes, scores, levels = (part[0, solid] for part in candidates[:3])
        best = _nms(boxes, scores, levels, RPN_NMS)[:PROPOSALS]
        return _Boxes(boxes[best], scores[best])

    def _detect(
        self, maps: list[Tensor], proposals: _Boxes, limits: Tensor, score_threshold: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `RoIHead.detect_boxes`."""
        head = self.model.roi_head
        logits, deltas = head.bbox_head(_pool(maps, proposals.boxes, 7, head.finest_scale))
        all_scores = logits.float().softmax(-1)[:, :-1]
        rows, labels = (all_scores > score_threshold).nonzero(as_tuple=True)
        chosen = deltas.float().unflatten(1, (-1, 4))[rows, labels]
        boxes = decode(proposals.boxes[rows], chosen, BOX_STDS, limits)
        scores = all_scores[rows, labels]
        best = _nms(boxes, scores, labels, BOX_NMS)[:MAX_DETECTIONS]
        return boxes[best], scores[best], labels[best]

    def _masks(self, maps: list[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """See `RoIHead.predict_masks`."""
        head = self.model.roi_head
        # With one box more, which is left out again, no operator gets an empty tensor: not every
        # runtime computes convolutions of them.
        boxes, labels = F.pad(boxes, (0, 0, 0, 1)), F.pad(labels, (0, 1))
        logits = head.mask_head(_pool(maps, boxes, 14, head.finest_scale), labels)
        return logits.float().sigmoid()[:-1]


class _GridSampleAttention(nn.Module):
    """Multi-scale deformable attention by ``grid_sample``, for levels whose sizes are constants."""

    def __init__(self, attention: MSDeformAttn, levels: list[tuple[int, int]]) -> None:
        super().__init__()
        self.sampling_offsets = attention.sampling_offsets
        self.attention_weights = attention.attention_weights
        self.value_proj = attention.value_proj
        self.output_proj = attention.output_proj
        self.heads = attention.heads
        self.levels = levels

    def forward(self, query: Tensor, points: Tensor, value: Tensor, shapes: Tensor) -> Tensor:
        """Attend from the queries to the values; see `MSDeformAttn.forward`."""
        batch, queries = query.shape[:2]
        grouped = (self.heads, len(self.levels), POINTS)
        offsets = self.sampling_offsets(query).unflatten(-1, (*grouped, 2))
        logits = self.attention_weights(query).unflatten(-1, grouped)
        locations, weights = locate(shapes, points, offsets, logits)
        per_head = value.unflatten(-1, (self.heads, -1)).permute(0, 2, 3, 1).flatten(0, 1)
        grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)
        areas = [height * width for height, width in self.levels]
        sampled = [
            F.grid_sample(
                part.unflatten(-1, shape).to(grids.dtype), grids[:, :, level], align_corners=False
            )
            for level, (part, shape) in enumerate(
                zip(per_head.split(areas, dim=-1), self.levels, strict=True)
            )
        ]
        shares = weights.transpose(1, 2).flatten(0, 1).flatten(2)[:, None]
        attended = (torch.cat(sampled, dim=-1) * shares).sum(-1)
        attended = attended.view(batch, -1, queries).transpose(1, 2)
        return self.output_proj(attended.to(value.dtype))


def _decompose(backbone: nn.Module, size: tuple[int, int]) -> None:
    """Replace the backbone's deformable attention by `_GridSampleAttention`."""
    grids = [(size[0] // stride, size[1] // stride) for stride in (8, 16, 32)]
    for parent in list(backbone.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, MSDeformAttn):
                levels = grids if child.levels == len(grids) else grids[1:2]
                setattr(parent, name, _GridSampleAttention(child, levels))


def _nms(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """See `boxes.nms_by_group`; the zero keeps the maximum of no boxes defined."""
    largest = F.pad(boxes.flatten(), (0, 1)).max()
    return nms(boxes + (groups.to(boxes) * (largest + 1))[:, None], scores, threshold)


def _pool(maps: list[Tensor], boxes: Tensor, size: int, finest_scale: int) -> Tensor:
    """See `boxes.pool_rois`; ``boxes`` are ``[R, 4]`` of one image."""
    scales = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    levels = (scales / finest_scale + 1e-6).log2().floor().clamp(0, len(ROI_STRIDES) - 1)
    rois = F.pad(boxes, (1, 0))
    orders, parts = [], []
    for level, (x, stride) in enumerate(zip(maps[: len(ROI_STRIDES)], ROI_STRIDES, strict=True)):
        chosen = (levels == level).nonzero().squeeze(1)
        pooled = torchvision_roi_align(x.float(), rois[chosen], size, 1 / stride, -1, aligned=True)
        orders.append(chosen)
        parts.append(pooled.to(x.dtype))
    return torch.cat(parts)[torch.cat(orders).argsort()]
