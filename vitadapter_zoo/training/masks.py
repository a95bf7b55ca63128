"""Annotated masks as bitmaps, drawn as COCO's own tools draw them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from vitadapter_zoo.training.annotations import Instance


def rasterised(instances: Sequence[Instance], height: int, width: int) -> npt.NDArray[np.uint8]:
    """Masks of objects, uint8 ``[n, height, width]`` of zeros and ones."""
    from hotcoco import mask

    if not instances:
        return np.zeros((0, height, width), np.uint8)
    encoded = [
        one.segmentation
        if isinstance(one.segmentation, dict)
        else mask.merge(mask.frPyObjects(one.segmentation, height, width))
        for one in instances
    ]
    columns = np.asarray(mask.decode(encoded), np.uint8)
    return cast("npt.NDArray[np.uint8]", np.ascontiguousarray(columns.transpose(2, 0, 1)))


def pixels_of(counts: str) -> int:
    """How many pixels the runs of a compressed RLE cover together; -1 where it is damaged.

    COCO writes a run as digits of 5 bits, the lowest first, with a bit that says whether more
    follow; from the fourth on, a run is written as the difference to the last but one.
    """
    codes = np.frombuffer(counts.encode("utf-8"), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes & 32 == 0)
    if not len(ends) or ends[-1] != len(codes) - 1 or codes.min() < 0 or codes.max() > 63:
        return -1
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 8:
        return -1
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    values = np.add.reduceat((codes & 31) << shifts, starts)
    values -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return -1 if values.min() < 0 else int(values.sum())
