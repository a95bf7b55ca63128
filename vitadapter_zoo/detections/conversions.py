"""Conversions of detections from and to other libraries: supervision and pandas."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.text import quoted

if TYPE_CHECKING:
    import pandas
    import supervision

    from vitadapter_zoo.detections import Detections


def to_dataframe(found: Detections) -> pandas.DataFrame:
    """See ``Detections.to_dataframe``."""
    try:
        import pandas
    except ImportError as error:
        raise ZooError("to_dataframe needs pandas: pip install pandas") from error
    x1, y1, x2, y2 = found.boxes.detach().numpy().T
    return pandas.DataFrame(
        {
            "name": found.class_names,
            "label": found.labels.numpy(),
            "score": found.scores.detach().numpy(),
            "x1": x1, "y1": y1, "x2": x2, "y2": y2,
            "area": np.asarray(found.mask_areas(), np.int64),
        }
    )  # fmt: skip


def to_supervision(found: Detections, *, with_masks: bool) -> supervision.Detections:
    """See ``Detections.to_supervision``."""
    try:
        import supervision
    except ImportError as error:
        raise ZooError("to_supervision needs supervision: pip install supervision") from error
    return supervision.Detections(
        xyxy=found.boxes.detach().numpy().copy(),
        mask=found.masks.numpy().copy() if with_masks else None,
        confidence=found.scores.detach().numpy().copy(),
        class_id=found.labels.numpy().astype(int),
        data={"class_name": np.asarray(found.class_names, dtype=str)},
    )


def check_names(found: supervision.Detections, categories: tuple[str, ...]) -> None:
    """Refuse categories that contradict the ``class_name`` that the detections carry.

    Raises:
        ZooError: a class has another name.
    """
    names = found.data.get("class_name")
    if names is None or found.class_id is None:
        return
    for label, name in zip(found.class_id.tolist(), names, strict=True):
        if 0 <= label < len(categories) and str(name) != categories[label]:
            raise ZooError(
                f"the class {label} is {quoted(name)} in these detections and "
                f"{quoted(categories[label])} in the categories; give "
                "categories=model.categories of the model that found them"
            )


def from_supervision(
    found: supervision.Detections, classes: int, size: tuple[int, int] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes, scores, labels and masks, see ``Detections.from_supervision``.

    Raises:
        ZooError: there are no masks, scores or classes, or a class id of ``classes`` or more.
    """
    count = len(found.xyxy)
    if count and (found.mask is None or found.confidence is None or found.class_id is None):
        lacks = "masks" if found.mask is None else "scores and class ids"
        raise ZooError(f"these supervision.Detections have no {lacks}; detections need them")
    if found.mask is None and size is None:
        raise ZooError("nothing was found: give the image's size=(height, width)")
    labels = np.zeros(0) if found.class_id is None else np.asarray(found.class_id)
    if count and not 0 <= labels.min() <= labels.max() < classes:
        raise ZooError(
            f"class ids from {labels.min()} to {labels.max()} do not fit the {classes} "
            "categories; give categories=(name, ...)"
        )
    scores = np.zeros(0) if found.confidence is None else np.asarray(found.confidence)
    masks = np.zeros((0, *(size or (1, 1)))) if found.mask is None else np.asarray(found.mask)
    return (
        torch.from_numpy(np.array(found.xyxy, np.float32)).reshape(-1, 4),
        torch.from_numpy(scores.astype(np.float32)),
        torch.from_numpy(labels.astype(np.int64)),
        torch.from_numpy(masks.astype(bool)),
    )
