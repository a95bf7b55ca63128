"""Detections as JSON-ready dictionaries: COCO results, and records with class names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from vitadapter_zoo.catalog import COCO_CATEGORY_IDS, COCO_CLASSES
from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.text import quoted

if TYPE_CHECKING:
    from vitadapter_zoo.detections import Detections


def coco_results(
    found: Detections, image_id: int, given_ids: Sequence[int] | Mapping[str, int] | None
) -> list[dict[str, Any]]:
    """See ``Detections.to_coco``."""
    ids = category_ids(found.categories, given_ids)
    return [
        {
            "image_id": image_id,
            "category_id": ids[label],
            "bbox": box,
            "score": score,
            "segmentation": {"size": list(found.size), "counts": counts},
        }
        for label, box, score, counts in zip(
            found.labels.tolist(),
            xywh(found.boxes),
            found.scores.tolist(),
            found.run_lengths(),
            strict=True,
        )
    ]


def records(found: Detections) -> list[dict[str, Any]]:
    """See ``Detections.to_records``."""
    return [
        {
            "name": name,
            "label": label,
            "score": score,
            "box": box,
            "segmentation": {"size": list(found.size), "counts": counts},
        }
        for name, label, score, box, counts in zip(
            found.class_names,
            found.labels.tolist(),
            found.scores.tolist(),
            found.boxes.tolist(),
            found.run_lengths(),
            strict=True,
        )
    ]


def category_ids(
    categories: tuple[str, ...], given: Sequence[int] | Mapping[str, int] | None
) -> Sequence[int]:
    """The data set's id of each class, see ``Detections.to_coco``.

    Raises:
        ZooError: the classes are not COCO's 80 and no ids are given, or a class has no id.
    """
    if given is None:
        if categories != COCO_CLASSES:
            raise ZooError(
                "these detections have other classes than COCO's 80: give the ids of your data "
                "set, to_coco(image_id, category_ids={name: id, ...})"
            )
        return COCO_CATEGORY_IDS
    if isinstance(given, Mapping):
        absent = [name for name in categories if name not in given]
        if absent:
            raise ZooError(f"category_ids has no id for the class {quoted(absent[0])}")
        return [given[name] for name in categories]
    if len(given) != len(categories):
        raise ZooError(f"there are {len(given)} category_ids for {len(categories)} classes")
    return given


def xywh(boxes: Tensor) -> list[list[float]]:
    """Boxes (x1, y1, x2, y2) as COCO's ``[x, y, width, height]``."""
    x1, y1, x2, y2 = boxes.detach().cpu().unbind(1)
    return cast("list[list[float]]", torch.stack([x1, y1, x2 - x1, y2 - y1], dim=1).tolist())
