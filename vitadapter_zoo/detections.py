"""What a detector found in one image."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from vitadapter_zoo.catalog import COCO_CATEGORY_IDS, COCO_CLASSES
from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.images import ImageInput, read_image

# Distinct hues, light enough for black text on them; taken in turn by label.
PALETTE = (
    "#ff6b6b", "#51cf66", "#ffd43b", "#74a9ff", "#ff922b", "#da77f2",
    "#66d9e8", "#f783ac", "#c0eb75", "#ffc9c9", "#63e6be", "#e0b080",
)  # fmt: skip


@dataclass(frozen=True)
class Instances:
    """Detections of one image as the network gives them: masks are not yet on the image.

    Attributes:
        boxes: float32 ``[N, 4]`` as (x1, y1, x2, y2) in image pixels.
        scores: float32 ``[N]`` in 0..1, best first.
        labels: int64 ``[N]``, index of the class.
        mask_probabilities: float32 ``[N, 28, 28]`` in 0..1, stretched over the box.
        size: (height, width) of the image in pixels.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    mask_probabilities: Tensor
    size: tuple[int, int]


@dataclass(frozen=True)
class Detections:
    """Detections of one image, best score first; all tensors are on the CPU.

    Attributes:
        boxes: float32 ``[N, 4]`` as (x1, y1, x2, y2) in image pixels.
        scores: float32 ``[N]`` in 0..1.
        labels: int64 ``[N]``, index into ``categories`` (0..79 for COCO).
        masks: bool ``[N, H, W]``, the image's size.
        categories: name of every class that the model knows.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor
    categories: tuple[str, ...] = COCO_CLASSES

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def class_names(self) -> list[str]:
        """The name of each detection's class, in order."""
        return [self.categories[label] for label in self.labels.tolist()]

    def filter(self, score: float) -> Detections:
        """Only the detections with at least this score (0..1)."""
        kept = self.scores >= score
        return replace(
            self,
            boxes=self.boxes[kept],
            scores=self.scores[kept],
            labels=self.labels[kept],
            masks=self.masks[kept],
        )

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """COCO results: one JSON-ready dictionary per detection.

        Each has ``image_id``, ``category_id`` (COCO's, not contiguous), ``bbox``
        ``[x, y, width, height]`` in image pixels, ``score`` and ``segmentation`` (compressed
        RLE). When masks are scored, leave ``bbox`` out: pycocotools takes the box's area for the
        mask's otherwise.

        Raises:
            ZooError: the classes are not COCO's 80, so there are no category ids to write.
        """
        if self.categories != COCO_CLASSES:
            raise ZooError(
                "to_coco writes COCO's category ids, but these detections have other classes"
            )
        return [
            {
                "image_id": image_id,
                "category_id": COCO_CATEGORY_IDS[label],
                "bbox": box,
                "score": score,
                "segmentation": {"size": list(self.masks.shape[1:]), "counts": counts},
            }
            for label, box, score, counts in zip(
                self.labels.tolist(),
                xywh(self.boxes),
                self.scores.tolist(),
                self.run_lengths(),
                strict=True,
            )
        ]

    def run_lengths(self) -> list[str]:
        """The masks as counts of COCO's compressed RLE."""
        from hotcoco import mask as coco_mask

        if not len(self):
            return []
        # RLE runs down the columns, hence Fortran order.
        columns = np.asfortranarray(self.masks.permute(1, 2, 0).numpy().astype(np.uint8))
        encoded = cast("list[dict[str, bytes | str]]", coco_mask.encode(columns))
        return [_text(rle["counts"]) for rle in encoded]

    def draw(self, image: ImageInput) -> Image.Image:
        """The image with masks, boxes, class names and scores on it.

        Args:
            image: the image that was given to ``predict``, in any of its forms.

        Raises:
            ZooError: the image has another size than the one these detections belong to.
            ImageError: not an image.
        """
        rgb = read_image(image)
        if rgb.shape[:2] != tuple(self.masks.shape[1:]):
            raise ZooError(
                f"the picture is {rgb.shape[1]} x {rgb.shape[0]} pixels, the detections belong to "
                f"one of {self.masks.shape[2]} x {self.masks.shape[1]}; draw on the same image"
            )
        canvas = torch.from_numpy(rgb.copy()).permute(2, 0, 1)
        if len(self):
            colors = [PALETTE[label % len(PALETTE)] for label in self.labels.tolist()]
            names = [
                f"{name} {score:.2f}"
                for name, score in zip(self.class_names, self.scores.tolist(), strict=True)
            ]
            canvas = draw_segmentation_masks(canvas, self.masks, alpha=0.5, colors=colors)
            canvas = draw_bounding_boxes(
                canvas,
                _drawable(self.boxes),
                names,
                colors=colors,
                width=2,
                label_colors="black",
                label_background_colors=colors,
                fill_labels=True,
            )
        return Image.fromarray(canvas.permute(1, 2, 0).numpy())


def xywh(boxes: Tensor) -> list[list[float]]:
    """Boxes (x1, y1, x2, y2) as COCO's ``[x, y, width, height]``."""
    x1, y1, x2, y2 = boxes.cpu().unbind(1)
    return cast("list[list[float]]", torch.stack([x1, y1, x2 - x1, y2 - y1], dim=1).tolist())


def _text(counts: bytes | str) -> str:
    return counts.decode() if isinstance(counts, bytes) else counts


def _drawable(boxes: Tensor) -> Tensor:
    """Torchvision refuses boxes whose rounded corners coincide: give those one pixel."""
    rounded = boxes.round()
    return torch.cat([rounded[:, :2], rounded[:, 2:].maximum(rounded[:, :2])], dim=1)
