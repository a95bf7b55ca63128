"""The heads of Mask R-CNN (arXiv:1703.06870): they predict proposals, boxes and masks."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.models.boxes import (
    ANCHOR_RATIOS,
    ANCHOR_SCALE,
    FINEST_SCALE,
    anchor_grids,
    box_limits,
    decode,
    nms_by_group,
    pool_rois,
)
from vitadapter_zoo.models.constants import uploaded
from vitadapter_zoo.models.convolution import Conv3x3
from vitadapter_zoo.models.necks import WIDTH, Conv

RPN_STRIDES = (4, 8, 16, 32, 64)
RPN_STDS = (1.0, 1.0, 1.0, 1.0)
BOX_STDS = (0.1, 0.1, 0.2, 0.2)
PROPOSALS = 1000  # per level before suppression, and over all levels after it
RPN_NMS = 0.7
BOX_NMS = 0.5
MAX_DETECTIONS = 100
# On a GPU: pairs of a proposal and a class above the threshold; a photo of COCO has a few hundred.
MOST_CANDIDATES = 4096
BOX_WIDTH = 1024  # width of the box head's hidden layers
MASK_CONVS = 4
REGIONS = 512  # proposals per image in training


class Proposals(NamedTuple):
    """Boxes of one image ``[N, 4]`` in network pixels with scores ``[N]`` in 0..1, best first."""

    boxes: Tensor
    scores: Tensor


class Candidates(NamedTuple):
    """Boxes before non-maximum suppression, as many for each image.

    Attributes:
        boxes: ``[N, M, 4]`` in network pixels.
        scores: ``[N, M]`` in 0..1.
        levels: of the map, int64 ``[N, M]``.
        solid: whether the box has an area, bool ``[N, M]``.
    """

    boxes: Tensor
    scores: Tensor
    levels: Tensor
    solid: Tensor


class BoxDetections(NamedTuple):
    """Detections of one image before their masks; boxes ``[N, 4]`` in image pixels."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Pending:
    """Results on the device that the host needs: the caller waits for them once, at the end.

    Attributes:
        finite: bool scalars; False if values are NaN or infinite.
        complete: bool scalars; False if an image had more than ``MOST_CANDIDATES`` candidates.
    """

    finite: list[Tensor] = field(default_factory=list)
    complete: list[Tensor] = field(default_factory=list)


class RPNHead(nn.Module):
    """Region proposal network over five levels.

    Args:
        width: channels of the neck's maps.
        anchor_scale: side of the square anchor in strides.
    """

    def __init__(self, width: int = WIDTH, anchor_scale: int = ANCHOR_SCALE) -> None:
        super().__init__()
        self.anchor_scale = anchor_scale
        self.rpn_conv = Conv3x3(width, width)
        self.rpn_cls = nn.Conv2d(width, len(ANCHOR_RATIOS), 1)
        self.rpn_reg = nn.Conv2d(width, 4 * len(ANCHOR_RATIOS), 1)

    def forward(self, maps: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return logits ``[N, 3, H, W]`` and deltas ``[N, 12, H, W]`` for each level."""
        outputs = []
        for x in maps:
            hidden = self.rpn_conv(x, relu=True)
            outputs.append((self.rpn_cls(hidden), self.rpn_reg(hidden)))
        return outputs

    def propose(self, maps: list[Tensor], sizes: list[tuple[int, int]]) -> list[Proposals]:
        """Return the best 1000 boxes of each image; see `select` for ``sizes``."""
        return self.select(self(maps), sizes, PROPOSALS)

    def select(
        self, outputs: list[tuple[Tensor, Tensor]], sizes: list[tuple[int, int]], count: int
    ) -> list[Proposals]:
        """Return the best 1000 boxes of each image.

        Args:
            outputs: from ``forward``.
            sizes: (height, width) of each resized image, network pixels.
            count: boxes per level that enter non-maximum suppression.
        """
        return suppressed(self.candidates(outputs, box_limits(sizes, outputs[0][0]), count))

    def candidates(
        self, outputs: list[tuple[Tensor, Tensor]], limits: Tensor, count: int = PROPOSALS
    ) -> Candidates:
        """Return the boxes that enter non-maximum suppression.

        The shapes of the results depend only on those of the arguments.

        Args:
            outputs: from ``forward``.
            limits: `box_limits` of the images.
            count: boxes per level.
        """
        shapes = tuple((logits.shape[2], logits.shape[3]) for logits, _ in outputs)
        grids = anchor_grids(shapes, RPN_STRIDES, outputs[0][0].device, self.anchor_scale)
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        for level, ((logits, deltas), grid) in enumerate(zip(outputs, grids, strict=True)):
            scores = logits.permute(0, 2, 3, 1).flatten(1).float().sigmoid()
            scores, best = scores.topk(min(count, len(grid)))
            deltas = deltas.permute(0, 2, 3, 1).reshape(len(deltas), -1, 4)
            deltas = deltas.take_along_dim(best[..., None], dim=1).float()
            boxes = decode(grid[best], deltas, RPN_STDS, limits)
            kept.append((boxes, scores, torch.full_like(best, level)))
        boxes, scores, levels = (torch.cat(parts, dim=1) for parts in zip(*kept, strict=True))
        solid = (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)
        return Candidates(boxes, scores, levels, solid)


def suppressed(found: Candidates) -> list[Proposals]:
    """Return each image's best 1000 boxes that do not overlap a better box of their level.

    There is one suppression per image: the shift of a group's boxes, which rounds their
    coordinates, depends on the image's largest box.
    """
    proposals = []
    for boxes, scores, levels, solid in zip(*found, strict=True):
        best = nms_by_group(boxes, scores, levels, RPN_NMS, solid)[:PROPOSALS]
        proposals.append(Proposals(boxes[best], scores[best]))
    return proposals


class BoxHead(nn.Module):
    """Two fully connected layers, then class scores and per-class boxes."""

    def __init__(self, classes: int, in_channels: int = WIDTH, width: int = BOX_WIDTH) -> None:
        super().__init__()
        self.fc_cls = nn.Linear(width, classes + 1)  # background is the last
        self.fc_reg = nn.Linear(width, 4 * classes)
        self.shared_fcs = nn.ModuleList(
            [nn.Linear(in_channels * 7 * 7, width), nn.Linear(width, width)]
        )

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``[R, C, 7, 7]`` to logits ``[R, classes + 1]`` and deltas ``[R, 4 * classes]``."""
        x = pooled.flatten(1)
        for layer in self.shared_fcs:
            x = F.relu(layer(x))
        return self.fc_cls(x), self.fc_reg(x)


class MaskHead(nn.Module):
    """Convolutions (four in the published networks) and an upsampling: a 28x28 mask per class."""

    def __init__(self, classes: int, width: int = WIDTH, convs: int = MASK_CONVS) -> None:
        super().__init__()
        self.convs = nn.ModuleList(Conv(width, width, 3) for _ in range(convs))
        self.upsample = nn.ConvTranspose2d(width, width, 2, 2)
        self.conv_logits = nn.Conv2d(width, classes, 1)

    def forward(self, pooled: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map ``[R, width, 14, 14]`` to logits ``[R, classes, 28, 28]``.

        With ``labels`` ``[R]`` only the mask of each region's class is computed: ``[R, 28, 28]``.
        """
        x = pooled
        for conv in self.convs:
            x = conv(x, relu=True)
        x = F.relu(self.upsample(x), inplace=True)
        if labels is None:
            return self.conv_logits(x)
        weight = self.conv_logits.weight.flatten(1)[labels]
        bias = self.conv_logits.get_parameter("bias")[labels]
        logits = x.permute(0, 2, 3, 1).flatten(1, 2) @ weight[..., None]
        return logits.view(-1, *x.shape[2:]) + bias[:, None, None]


class RoIHead(nn.Module):
    """The box head and the mask head: from proposals to boxes with classes, from boxes to masks.

    Args:
        classes: number of classes without the background.
        width: channels of the neck's maps and of the mask head.
        box_width: width of the box head's hidden layers.
        mask_convs: number of 3x3 convolutions in the mask head.
        regions: proposals per image in training; at most a quarter of them are positive.
        finest_scale: boxes below twice this size in pixels are pooled at stride 4.
    """

    def __init__(
        self,
        classes: int,
        width: int = WIDTH,
        box_width: int = BOX_WIDTH,
        mask_convs: int = MASK_CONVS,
        regions: int = REGIONS,
        finest_scale: int = FINEST_SCALE,
    ) -> None:
        super().__init__()
        self.regions = regions
        self.finest_scale = finest_scale
        self.bbox_head = BoxHead(classes, width, box_width)
        self.mask_head = MaskHead(classes, width, mask_convs)

    def detect_boxes(
        self,
        maps: list[Tensor],
        proposals: list[Proposals],
        sizes: list[tuple[int, int]],
        scales: list[tuple[float, float, float, float]],
        score_threshold: float,
        pending: Pending | None = None,
    ) -> list[BoxDetections]:
        """Return the best 100 boxes of each image, in image pixels.

        Args:
            maps: the neck's maps at strides 4, 8, 16 and 32.
            proposals: per image.
            sizes: (height, width) of the resized images, network pixels.
            scales: network pixels per image pixel, for (x, y, x, y).
            score_threshold: lowest score kept, 0..1.
            pending: takes what is to be checked, instead of waiting for it here. On a GPU the
                result is then that of the best ``MOST_CANDIDATES`` candidates.

        Raises:
            ZooError: without ``pending``, a score is NaN or infinite.
        """
        counts = [len(proposal.boxes) for proposal in proposals]
        rois = _rois([proposal.boxes for proposal in proposals])
        pooled = pool_rois(maps, rois, 7, self.finest_scale)
        logits, deltas = self.bbox_head(pooled)
        scores = logits.float().softmax(-1)[:, :-1]
        if pending is None:
            check_finite(scores)
        else:
            pending.finite.append(scores.isfinite().all())
        detections = []
        for proposal, image_scores, image_deltas, limits, scale in zip(
            proposals,
            scores.split(counts),
            deltas.float().split(counts),
            box_limits(sizes, scores),
            uploaded(scales, scores),
            strict=True,
        ):
            rows, labels, valid = _candidates(image_scores, score_threshold, pending)
            chosen_deltas = image_deltas.unflatten(1, (-1, 4))[rows, labels]
            boxes = decode(proposal.boxes[rows], chosen_deltas, BOX_STDS, limits) / scale
            chosen_scores = image_scores[rows, labels]
            best = nms_by_group(boxes, chosen_scores, labels, BOX_NMS, valid)[:MAX_DETECTIONS]
            detections.append(BoxDetections(boxes[best], chosen_scores[best], labels[best]))
        return detections

    def predict_masks(
        self,
        maps: list[Tensor],
        detections: list[BoxDetections],
        scales: list[tuple[float, float, float, float]],
    ) -> list[Tensor]:
        """Return the mask probabilities ``[N, 28, 28]`` of each image's detections.

        Each mask is that of the detection's class.
        """
        rows = uploaded(scales, detections[0].boxes)
        boxes = [found.boxes * scale for found, scale in zip(detections, rows, strict=True)]
        labels = torch.cat([found.labels for found in detections])
        logits = self.mask_head(pool_rois(maps, _rois(boxes), 14, self.finest_scale), labels)
        return list(logits.float().sigmoid().split([len(found.labels) for found in detections]))


def _candidates(
    scores: Tensor, threshold: float, pending: Pending | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Choose the pairs of a proposal and a class above the threshold: a few hundred of 80,000.

    Args:
        scores: ``[R, classes]``.
        threshold: lowest score, exclusive.
        pending: see `RoIHead.detect_boxes`.

    Returns:
        Rows and classes, and which of the pairs are above the threshold; None if all are.
    """
    if pending is None or scores.device.type == "cpu":
        rows, labels = (scores > threshold).nonzero(as_tuple=True)
        return rows, labels, None
    # A fixed number of pairs, because the CPU would wait for the number of those above the
    # threshold. The stable order makes ties fall as above.
    values, order = scores.flatten().sort(descending=True, stable=True)
    best, values = order[:MOST_CANDIDATES], values[: MOST_CANDIDATES + 1]
    pending.complete.append(~(values[MOST_CANDIDATES:] > threshold).any())
    classes = scores.shape[1]
    return best // classes, best % classes, values[:MOST_CANDIDATES] > threshold


def downloaded(
    found: list[BoxDetections], masks: list[Tensor], flags: Tensor
) -> tuple[list[tuple[Tensor, Tensor, Tensor, Tensor]], list[bool]]:
    """Copy results to the CPU, in one copy.

    Args:
        found: boxes, scores and labels of each image.
        masks: mask probabilities of each image, ``[N, 28, 28]``.
        flags: bool ``[K]``.

    Returns:
        Boxes, scores, labels and masks of each image, and the flags.
    """
    parts = [(*boxes, maps) for boxes, maps in zip(found, masks, strict=True)]
    if flags.device.type == "cpu":
        return parts, flags.tolist()
    # float32 holds every class's number exactly.
    packed = torch.cat([flags.float(), *(x.flatten().float() for part in parts for x in part)])
    values = iter(packed.cpu().split([len(flags), *(x.numel() for part in parts for x in part)]))
    passed = next(values).bool().tolist()
    parts = [
        tuple(next(values).view(x.shape).to(x.dtype, copy=True) for x in part) for part in parts
    ]
    return parts, passed


def not_finite() -> ZooError:
    """Create the error for a network that computes NaN or infinite values."""
    return ZooError(
        "the network computes NaN or infinite values: its weights are damaged, or too large "
        "for its dtype; load it again, or with dtype=torch.float32"
    )


def check_finite(values: Tensor) -> None:
    """Refuse NaN and infinite values, which would otherwise give an empty result without an error.

    Raises:
        ZooError: a value is NaN or infinite.
    """
    if not values.isfinite().all():
        raise not_finite()


def _rois(boxes: list[Tensor]) -> Tensor:
    """Concatenate the boxes of all images to ``[R, 5]``, with the image index first."""
    return torch.cat([F.pad(part, (1, 0), value=index) for index, part in enumerate(boxes)])
