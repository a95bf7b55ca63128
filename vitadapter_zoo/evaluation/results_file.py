"""Reading and checking files in COCO's result format, from this package or another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitadapter_zoo import settings
from vitadapter_zoo.errors import DatasetError
from vitadapter_zoo.evaluation import ids, masks, values
from vitadapter_zoo.evaluation.dataset import Dataset, Image
from vitadapter_zoo.evaluation.ids import Id
from vitadapter_zoo.evaluation.run import ImageResult
from vitadapter_zoo.text import JSONError, parse_json, shown


def read_results(path: Path, data: Dataset) -> list[ImageResult]:
    """Read detections with masks in COCO's result format.

    Args:
        path: a JSON list of dictionaries with image_id, category_id, score, segmentation
            (compressed RLE), and bbox ``[x, y, width, height]``; where bbox is absent it is the
            mask's.
        data: the data set that the results belong to.

    Returns:
        One result for every image of ``data``. Images that the file does not name have no
        detections.

    Raises:
        DatasetError: the file is not in this format, or belongs to another data set.
    """
    path = settings.expanded(path)
    file = shown(path, 300)
    try:
        content = parse_json(path.read_bytes())
    except OSError as error:
        raise DatasetError(f"cannot read the results {file}: {error.strerror}") from error
    except JSONError as error:
        raise _not_results(file, str(error)) from error
    if not isinstance(content, list):
        raise _not_results(file, "it is not a list")
    sizes = {image.image_id: image.size for image in data.images}
    categories = {key for key, _ in data.categories}
    by_image: dict[Id, list[_Detection]] = {key: [] for key in sizes}
    for place, entry in enumerate(content):
        name = f"detection {place} of {file}"
        if isinstance(entry, dict) and ("bbox" in entry) != ("bbox" in content[0]):
            raise _not_results(  # pycocotools goes by the first one, and other tools do not
                file, f"some detections have a bbox and others, {place} for one, do not"
            )
        if not isinstance(entry, dict):
            raise _not_results(file, f"detection {place} is not an object")
        image_id, category_id = (ids.read(entry.get(key)) for key in ("image_id", "category_id"))
        if image_id is None or category_id is None:
            raise _not_results(file, f"detection {place} has no image_id or no category_id")
        if image_id not in sizes:
            raise DatasetError(
                f"{name} is in image {shown(repr(image_id))}, which {shown(data.annotations, 300)} "
                "does not have: the results belong to another data set"
            )
        if category_id not in categories:
            raise DatasetError(
                f"{name} is of category {shown(repr(category_id))}, which "
                f"{shown(data.annotations, 300)} does not have: write the annotation file's "
                "category ids, not labels"
            )
        found = _detection(entry, category_id, place, file, sizes[image_id])
        by_image[image_id].append(found)
    _check_masks(content, file)
    return [_result(image, by_image[image.image_id]) for image in data.images]


@dataclass(frozen=True, slots=True)
class _Detection:
    category_id: Id
    score: float
    mask: str
    box: list[float] | None


def _not_results(file: str, reason: str) -> DatasetError:
    return DatasetError(
        f"{file} is not in COCO's result format ({reason}); that is a JSON list of objects with "
        "image_id, category_id, score, bbox and segmentation (RLE)"
    )


def _detection(
    entry: dict[str, Any], category_id: Id, place: int, file: str, size: tuple[int, int]
) -> _Detection:
    """One detection with everything checked except the run lengths of its mask."""
    score, mask = values.number(entry.get("score"), 0, 1), entry.get("segmentation")
    if score is None:
        raise _not_results(file, f"detection {place} has a score that is not a number in 0..1")
    counts = mask.get("counts") if isinstance(mask, dict) else None
    if not isinstance(mask, dict) or not isinstance(counts, str) or not counts.isascii():
        raise _not_results(file, f"detection {place} has no compressed RLE")
    try:
        masks.check_size(mask, size)
    except masks.MaskError as error:
        raise DatasetError(f"detection {place} of {file} {error}") from error
    box = values.box(entry.get("bbox"))
    if box is None and "bbox" in entry:
        raise _not_results(
            file,
            f"detection {place} has a bbox that is not four numbers [x, y, width, height] in "
            "pixels",
        )
    return _Detection(category_id, score, counts, box)


def _check_masks(content: list[dict[str, Any]], file: str) -> None:
    """Check the run lengths of all masks at once, which is many times faster than one by one."""
    counts = [entry["segmentation"]["counts"].encode() for entry in content]
    for place, total in enumerate(masks.totals(counts).tolist()):
        size = content[place]["segmentation"]["size"]
        try:
            masks.check_total(total, (size[0], size[1]))
        except masks.MaskError as error:
            raise DatasetError(f"detection {place} of {file} {error}") from error


def _result(image: Image, detections: list[_Detection]) -> ImageResult:
    return ImageResult(
        image_id=image.image_id,
        size=image.size,
        boxes=[_box(one, image.size) for one in detections],
        scores=[one.score for one in detections],
        category_ids=[one.category_id for one in detections],
        masks=[one.mask for one in detections],
    )


def _box(detection: _Detection, size: tuple[int, int]) -> list[float]:
    if detection.box is not None:
        return detection.box
    from hotcoco import mask

    box = mask.to_bbox({"size": list(size), "counts": detection.mask})
    return [float(x) for x in box]
