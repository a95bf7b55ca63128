"""Files of COCO results, from here or from elsewhere."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from vitadapter_zoo.errors import DatasetError
from vitadapter_zoo.evaluation.dataset import Dataset
from vitadapter_zoo.evaluation.run import ImageResult


def read_results(path: Path, data: Dataset) -> list[ImageResult]:
    """Read detections with masks in COCO's result format.

    Args:
        path: a JSON list of dictionaries with image_id, category_id, score, segmentation
            (compressed RLE), and bbox ``[x, y, width, height]``; where bbox is absent it is the
            mask's.
        data: what they belong to.

    Returns:
        One result for every image of ``data``: those that the file does not name had no detections.

    Raises:
        DatasetError: not such a file, or of another data set.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, list):
            raise ValueError("it is no list")
        by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for place, detection in enumerate(content):
            by_image[detection["image_id"]].append(_checked(detection, place))
    except OSError as error:
        raise DatasetError(f"cannot read the results {path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(
            f"{path} is not in COCO's result format ({type(error).__name__}: {error}): a JSON list "
            "of dictionaries with image_id, category_id, score, bbox and segmentation (RLE)"
        ) from error
    images = {image.image_id: image for image in data.images}
    categories = {key for key, _ in data.categories}
    for image_id, detections in by_image.items():
        if image_id not in images:
            raise DatasetError(
                f"{path} has detections for image {image_id!r}, which {data.annotations} does not "
                "have: they belong to another data set"
            )
        for detection in detections:
            if detection["category_id"] not in categories:
                raise DatasetError(
                    f"{path} has detections of category {detection['category_id']!r}, which "
                    f"{data.annotations} does not have: write the file's category ids, not labels"
                )
            if tuple(detection["segmentation"]["size"]) != images[image_id].size:
                raise DatasetError(
                    f"{path} has a mask of size {detection['segmentation']['size']} for image "
                    f"{image_id}, which is {list(images[image_id].size)}: they belong to another "
                    "data set"
                )
    return [_result(image.image_id, image.size, by_image[image.image_id]) for image in data.images]


def _checked(detection: dict[str, Any], place: int) -> dict[str, Any]:
    segmentation = detection["segmentation"]
    if not isinstance(segmentation, dict) or not isinstance(segmentation["counts"], str):
        raise ValueError(f"detection {place} has no compressed RLE")
    if not isinstance(detection["category_id"], int) or not 0 <= detection["score"] <= 1:
        raise ValueError(f"detection {place} has no category id, or a score outside 0..1")
    if "bbox" not in detection:
        from hotcoco import mask

        detection["bbox"] = mask.to_bbox(segmentation)
    if len(detection["bbox"]) != 4:
        raise ValueError(f"detection {place} has a bbox without four numbers")
    return detection


def _result(image_id: int, size: tuple[int, int], detections: list[dict[str, Any]]) -> ImageResult:
    return ImageResult(
        image_id=image_id,
        size=size,
        boxes=[[float(x) for x in one["bbox"]] for one in detections],
        scores=[float(one["score"]) for one in detections],
        category_ids=[one["category_id"] for one in detections],
        masks=[one["segmentation"]["counts"] for one in detections],
    )
