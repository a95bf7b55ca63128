"""The masks of the objects in one image, kept small until their pixels are needed.

A hundred masks of a 48 megapixel photo are 4.8 GB as bool tensors. As the network gives them, 28 x
28 probabilities for each box, they are 0.3 MB.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vitadapter_zoo.ops.masks import STRIP_PIXELS, paste_masks, paste_rle, paste_strips

MASK_THRESHOLD = 0.5  # smallest probability that belongs to the object


@dataclass(frozen=True)
class MaskMaps:
    """Mask probabilities, each relative to its box.

    Attributes:
        probabilities: float32 ``[N, 28, 28]`` in 0..1.
        boxes: float32 ``[N, 4]`` as (x1, y1, x2, y2) in image pixels.
        size: (height, width) of the image in pixels.
    """

    probabilities: Tensor
    boxes: Tensor
    size: tuple[int, int]


# As the network gives them, or bool [N, H, W].
Masks: TypeAlias = MaskMaps | Tensor


def size_of(masks: Masks) -> tuple[int, int]:
    """(height, width) of the image in pixels."""
    return masks.size if isinstance(masks, MaskMaps) else (masks.shape[1], masks.shape[2])


def take(masks: Masks, chosen: Tensor) -> Masks:
    """Select the masks with these indices, int64 ``[K]``."""
    if isinstance(masks, MaskMaps):
        return MaskMaps(masks.probabilities[chosen], masks.boxes[chosen], masks.size)
    return masks[chosen]


def resized(masks: Masks, size: tuple[int, int]) -> Masks:
    """Convert masks to an image resized to ``size`` (height, width) in pixels."""
    if isinstance(masks, MaskMaps):
        boxes = masks.boxes * scales(masks.size, size)
        return MaskMaps(masks.probabilities, boxes, size)
    if not len(masks):
        return masks.new_zeros(0, *size)
    smooth = functional.interpolate(masks[:, None].float(), size, mode="bilinear")
    return smooth[:, 0] > MASK_THRESHOLD


def scales(old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Return the factors, float32 ``[4]``, that scale boxes from one image size to another."""
    return torch.tensor([new[1] / old[1], new[0] / old[0]] * 2, device="cpu")


def dense(masks: Masks) -> Tensor:
    """Paste the masks into the image: bool ``[N, H, W]``, N bytes per pixel."""
    if isinstance(masks, MaskMaps):
        return paste_masks(masks.probabilities, masks.boxes, masks.size, MASK_THRESHOLD)
    return masks


def strips(masks: Masks) -> Iterator[tuple[int, slice, slice, Tensor]]:
    """Yield the masks in pieces; see `vitadapter_zoo.ops.masks.paste_strips`."""
    if isinstance(masks, MaskMaps):
        yield from paste_strips(masks.probabilities, masks.boxes, masks.size, MASK_THRESHOLD)
        return
    for index, mask in enumerate(masks):
        rows = mask.any(1).nonzero().flatten()
        if not len(rows):
            continue
        columns = mask.any(0).nonzero().flatten()
        left, right = int(columns[0]), int(columns[-1]) + 1
        bottom = int(rows[-1]) + 1
        step = max(STRIP_PIXELS // (right - left), 1)
        for top in range(int(rows[0]), bottom, step):
            strip = slice(top, min(top + step, bottom)), slice(left, right)
            yield index, *strip, mask[strip]


def areas(masks: Masks) -> list[int]:
    """Return the number of pixels of each mask."""
    counts = [0] * len(masks.boxes if isinstance(masks, MaskMaps) else masks)
    for index, _, _, inside in strips(masks):
        counts[index] += int(inside.sum())
    return counts


def run_lengths(masks: Masks) -> list[str]:
    """Encode the masks as the counts of COCO's compressed RLE."""
    if isinstance(masks, MaskMaps):
        return paste_rle(masks.probabilities, masks.boxes, masks.size, MASK_THRESHOLD)
    from hotcoco import mask as coco_mask

    encoded = []
    for mask in masks:
        # COCO encodes column by column, so it reads Fortran order.
        rle = coco_mask.encode(np.asfortranarray(mask.to(torch.uint8).numpy()))
        encoded.append(cast("bytes | str", rle["counts"]))
    return [counts.decode() if isinstance(counts, bytes) else counts for counts in encoded]
