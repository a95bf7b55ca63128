"""Annotated masks as bitmaps, drawn as COCO's own tools draw them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

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
