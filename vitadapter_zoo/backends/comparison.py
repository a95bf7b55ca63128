"""Comparing two implementations of a detector on the same image, stage by stage.

The limits are the differences that this package allows between itself and the original.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

from vitadapter_zoo.detections import Detections
from vitadapter_zoo.images import ImageInput, NetworkInput
from vitadapter_zoo.models import MaskRCNN
from vitadapter_zoo.models.modes import evaluating

INPUT_LIMIT = 1e-6
FEATURE_LIMIT = 1e-4  # relative to the tensor's largest magnitude
PROPOSAL_LIMIT = 0.01  # share of proposals without a counterpart
SCORE_LIMIT = 1e-3
OVERLAP_LIMIT = 0.01  # 1 - IoU, of boxes and of masks
# Rounding decides whether a pixel with a probability close to 0.5 belongs to the mask. In a mask of
# fewer than 100 pixels a single such pixel exceeds the limit, so one differing pixel is ignored.
IGNORED_PIXELS = 1


@dataclass(frozen=True)
class Stages:
    """The results of a detector on an image; tensors are on the CPU, boxes (x1, y1, x2, y2).

    Attributes:
        input: ``[1, 3, H, W]``, normalised and padded.
        resized: (height, width) of the image inside the input.
        original: (height, width) of the original image.
        scale: network pixels per image pixel for (x, y, x, y).
        backbone: four maps at strides 4 to 32.
        neck: five maps of 256 channels at strides 4 to 64.
        proposals: ``[P, 4]`` in network pixels, best first.
        proposal_scores: ``[P]`` in 0..1.
        detections: the detector's output.
    """

    input: Tensor
    resized: tuple[int, ...]
    original: tuple[int, ...]
    scale: tuple[float, ...]
    backbone: list[Tensor]
    neck: list[Tensor]
    proposals: Tensor
    proposal_scores: Tensor
    detections: Detections


@dataclass(frozen=True)
class Difference:
    """The difference between two implementations in one stage; infinite if the shapes differ.

    Attributes:
        stage: ``input``, ``backbone.0``, ..., ``masks``.
        measured: the largest difference found, in the unit of the stage's limit.
        limit: largest difference at which the stage agrees.
    """

    stage: str
    measured: float
    limit: float

    @property
    def agrees(self) -> bool:
        """Whether the difference is within the limit."""
        return self.measured <= self.limit


@torch.inference_mode()
def native_stages(model: MaskRCNN, image: ImageInput | NetworkInput) -> Stages:
    """Run this package's detector on an image, or an input made of one; return its stages' results.

    Raises:
        ImageError: the input is not an image.
    """
    prepared = image if isinstance(image, NetworkInput) else model.preprocess(image)
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        getattr(model, name).register_forward_hook(
            lambda _module, _arguments, output, name=name: seen.update({name: output})
        )
        for name in ("backbone", "neck")
    ]
    try:
        with evaluating(model):
            detections = model([prepared])[0]
            proposals = model.rpn_head.propose(seen["neck"], [prepared.resized])[0]
    finally:
        for hook in hooks:
            hook.remove()
    return Stages(
        input=prepared.tensor,
        resized=prepared.resized,
        original=prepared.original,
        scale=prepared.scale,
        backbone=[x.cpu() for x in seen["backbone"]],
        neck=[x.cpu() for x in seen["neck"]],
        proposals=proposals.boxes.cpu(),
        proposal_scores=proposals.scores.cpu(),
        detections=detections,
    )


def differences(ours: Stages, theirs: Stages) -> list[Difference]:
    """Return the difference of every stage, in the order of the computation."""
    detections = detection_differences(ours.detections, theirs.detections)
    return stage_differences(ours, theirs) + detections


def stage_differences(ours: Stages, theirs: Stages) -> list[Difference]:
    """Return the difference of every stage before the detections."""
    geometry = (ours.resized, ours.original, ours.scale) == (
        theirs.resized,
        theirs.original,
        theirs.scale,
    )
    found = [
        Difference("sizes", 0.0 if geometry else math.inf, 0.0),
        Difference("input", _largest(ours.input, theirs.input), INPUT_LIMIT),
    ]
    for name in ("backbone", "neck"):
        for index, (a, b) in enumerate(
            zip(getattr(ours, name), getattr(theirs, name), strict=True)
        ):
            relative = _largest(a, b) / float(b.abs().max())
            found.append(Difference(f"{name}.{index}", relative, FEATURE_LIMIT))
    matched = matches(
        ours.proposals, ours.proposal_scores, theirs.proposals, theirs.proposal_scores
    )
    unmatched = float((matched < 0).double().mean()) if len(matched) else 0.0
    found.append(Difference("proposals", unmatched, PROPOSAL_LIMIT))
    return found


def detection_differences(ours: Detections, theirs: Detections) -> list[Difference]:
    """Return the number of detections without a counterpart and the differences of the others.

    Boxes and masks are compared by 1 - IoU. One differing pixel per mask is ignored.
    """
    matched = matches(_apart(ours), ours.scores, _apart(theirs), theirs.scores)
    rows = (matched >= 0).nonzero().flatten()
    partners = matched[rows]
    alone = len(ours) + len(theirs) - 2 * len(rows)
    boxes = box_iou(ours.boxes[partners].double(), theirs.boxes[rows].double()).diagonal()
    scores = (ours.scores[partners] - theirs.scores[rows]).abs()
    a, b = ours.masks[partners], theirs.masks[rows]
    union = (a | b).sum(dim=(1, 2)).clamp(min=1)
    apart = ((a ^ b).sum(dim=(1, 2)) - IGNORED_PIXELS).clamp(min=0) / union
    return [
        Difference("detections", float(alone), 0.0),
        Difference("boxes", _worst(1 - boxes), OVERLAP_LIMIT),
        Difference("scores", _worst(scores), SCORE_LIMIT),
        Difference("masks", _worst(apart), OVERLAP_LIMIT),
    ]


def worst(per_image: Sequence[Sequence[Difference]]) -> list[Difference]:
    """Return each stage's largest difference over several images."""
    return [max(stage, key=lambda found: found.measured) for stage in zip(*per_image, strict=True)]


def matches(boxes: Tensor, scores: Tensor, reference: Tensor, reference_scores: Tensor) -> Tensor:
    """Return the index of each reference box's counterpart, or -1 without a counterpart.

    A counterpart has an IoU above 0.99 and a score within 1e-3. Each box is used only once.
    """
    fits = box_iou(reference.double(), boxes.double()) > 1 - OVERLAP_LIMIT
    fits &= (reference_scores[:, None] - scores[None]).abs() < SCORE_LIMIT
    found = torch.full((len(reference),), -1)
    for index, row in enumerate(fits):
        candidates = row.nonzero().flatten()
        if len(candidates):
            best = candidates[(scores[candidates] - reference_scores[index]).abs().argmin()]
            found[index] = best
            fits[:, best] = False
    return found


def _apart(detections: Detections) -> Tensor:
    """Shift the boxes of each class far away, so that only boxes of the same class overlap."""
    return detections.boxes.double() + 1e5 * detections.labels[:, None]


def _largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.shape == b.shape else math.inf


def _worst(values: Tensor) -> float:
    return float(values.max()) if len(values) else 0.0
