"""Masks of annotation and result files: polygons and run lengths, checked before they are scored.

A run-length encoding (RLE) counts the pixels of a mask column by column: first background, then
object, in turn. COCO compresses the counts to text: each count, from the fourth on less the one two
before it, in groups of 5 bits with a sixth for "more follows", as characters from "0" on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from hotcoco import mask as coco_mask

from vitadapter_zoo.evaluation import values

SMALLEST_POLYGON = 6  # numbers: three points
MOST_DIGITS = 7  # of 5 bits: more than any image has pixels
_CHUNK = 1 << 14  # characters of compressed masks that are decoded at a time


class MaskError(ValueError):
    """Why a mask cannot be scored; the caller says whose mask it is."""


def compressed(segmentation: Any, size: tuple[int, int]) -> bytes:
    """Convert a COCO segmentation, in any of its three forms, to compressed RLE counts.

    Args:
        segmentation: a list of polygons ``[x1, y1, x2, y2, ...]`` in image pixels, or an RLE
            dictionary with ``size`` and ``counts``, as a list of counts or compressed. Parts of
            fewer than three points beside a real polygon cover nothing and are ignored.
        size: (height, width) of the image in pixels.

    Raises:
        MaskError: none of these forms, without a single polygon of three points, polygons that
            cannot cover a pixel, or an RLE that is damaged, empty or of another size.
    """
    if isinstance(segmentation, list):
        return _of_polygons(segmentation, size)
    if isinstance(segmentation, dict):
        return _of_rle(segmentation, size)
    raise MaskError("has no mask: its segmentation is neither a list of polygons nor an RLE")


def _of_polygons(polygons: list[Any], size: tuple[int, int]) -> bytes:
    parts = []
    for polygon in polygons:
        if not isinstance(polygon, list):
            raise MaskError(
                "has no mask: its segmentation has to be a list of polygons, each a list of "
                "numbers [x1, y1, x2, y2, ...]"
            )
        numbers = values.coordinates(polygon)
        if numbers is None:
            raise MaskError("has a polygon whose coordinates are not numbers in image pixels")
        if len(numbers) % 2:
            raise MaskError("has a polygon with an x and no y")
        if len(numbers) >= SMALLEST_POLYGON:
            parts.append(numbers)
    if not parts:
        raise MaskError("has no mask: none of its polygons has three points")
    merged = coco_mask.merge([coco_mask.fr_poly(part, *size) for part in parts])
    # COCO's rasteriser also loses objects that are smaller than a pixel. Those are scored.
    if not any(_has_extent(part, size) for part in parts) and not coco_mask.area(merged):
        raise MaskError(
            "has no mask: its polygons are points or lines, or lie outside of the image, and cover "
            "no pixel"
        )
    counts: bytes = merged["counts"]
    return counts


def _has_extent(polygon: list[float], size: tuple[int, int]) -> bool:
    """Whether a polygon has an area, some of it perhaps in the image."""
    xs, ys = polygon[0::2], polygon[1::2]
    inside = max(xs) > 0 and max(ys) > 0 and min(xs) < size[1] and min(ys) < size[0]
    pairs = zip(xs, ys, [*xs[1:], xs[0]], [*ys[1:], ys[0]], strict=True)
    return inside and sum(x1 * y2 - x2 * y1 for x1, y1, x2, y2 in pairs) != 0


def _of_rle(rle: dict[str, Any], size: tuple[int, int]) -> bytes:
    check_size(rle, size)
    counts = rle.get("counts")
    if isinstance(counts, list):
        if not all(type(count) is int and 0 <= count <= math.prod(size) for count in counts):
            raise MaskError("has an RLE with counts that are not numbers of pixels")
        check_total(sum(counts), size)
        counts = coco_mask.fr_py_objects({"size": list(size), "counts": counts}, *size)["counts"]
    elif isinstance(counts, str) and counts.isascii():
        counts = counts.encode()
        check_total(int(totals([counts])[0]), size)
    else:
        raise MaskError("has no mask: its RLE has no counts")
    if not coco_mask.area({"size": list(size), "counts": counts}):
        raise MaskError("has no mask: its RLE covers no pixel")
    return bytes(counts)


def check_size(rle: dict[str, Any], size: tuple[int, int]) -> None:
    """Refuse an RLE of another (height, width) than the image's.

    Raises:
        MaskError: so it is.
    """
    if rle.get("size") != list(size):
        raise MaskError(
            f"has a mask whose size is not {list(size)}, its image's [height, width]: one of the "
            "two was edited, or belongs to another data set"
        )


def check_total(total: int, size: tuple[int, int]) -> None:
    """Refuse an RLE whose counts do not add up to the pixels of the image.

    Raises:
        MaskError: so it is.
    """
    if total < 0:
        raise MaskError("has a damaged RLE: its counts cannot be decoded")
    if total != math.prod(size):
        raise MaskError(
            f"has a damaged RLE: it describes {total:,} pixels, its image has {math.prod(size):,}"
        )


def totals(masks: Sequence[bytes]) -> npt.NDArray[np.int64]:
    """Count the pixels that each compressed RLE describes; -1 if its text is not an RLE.

    Args:
        masks: compressed counts.
    """
    found = []
    start = 0
    while start < len(masks):
        end, characters = start, 0
        while end < len(masks) and (end == start or characters < _CHUNK):
            characters += len(masks[end])
            end += 1
        found.append(_totals(masks[start:end]))
        start = end
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _totals(masks: Sequence[bytes]) -> npt.NDArray[np.int64]:
    lengths = np.array([len(mask) for mask in masks], np.int64)
    letters = np.frombuffer(b"".join(masks), np.uint8).astype(np.int64) - ord("0")
    result = np.zeros(len(masks), np.int64)
    if not len(letters):
        return result
    mask_of = np.repeat(np.arange(len(masks)), lengths)
    is_end = (letters & 32) == 0  # of a number
    last = np.cumsum(lengths)[lengths > 0] - 1
    damaged = np.zeros(len(masks), np.bool_)
    damaged[mask_of[last[~is_end[last]]]] = True
    damaged[mask_of[(letters < 0) | (letters > 63)]] = True
    is_end[last] = True
    begins = np.concatenate([[0], np.flatnonzero(is_end)[:-1] + 1])
    digits = np.diff(begins, append=len(letters))
    damaged[mask_of[begins[digits > MOST_DIGITS]]] = True
    place = np.minimum(np.arange(len(letters)) - np.repeat(begins, digits), MOST_DIGITS)
    numbers = np.add.reduceat((letters & 31) << (5 * place), begins)
    negative = (letters[np.flatnonzero(is_end)] & 16) != 0
    numbers -= np.where(negative, 1 << (5 * np.minimum(digits, MOST_DIGITS)), 0)
    owner = mask_of[begins]
    counts = _undo_differences(numbers, owner)
    damaged[owner[counts < 0]] = True
    np.add.at(result, owner, counts)
    return np.where(damaged, -1, result)


def _undo_differences(
    numbers: npt.NDArray[np.int64], owner: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Undo the delta coding: the fourth and later counts are relative to the one two before."""
    first = np.flatnonzero(np.diff(owner, prepend=-1))
    place = np.arange(len(numbers)) - np.repeat(first, np.diff(first, append=len(numbers)))
    chain = 3 * owner + np.where(place == 0, 0, 1 + place % 2)
    order = np.argsort(chain, kind="stable")
    sums = np.cumsum(numbers[order])
    starts = np.flatnonzero(np.diff(chain[order], prepend=-1))
    before = (sums - numbers[order])[starts]
    counts = np.empty_like(numbers)
    counts[order] = sums - np.repeat(before, np.diff(starts, append=len(numbers)))
    return counts
