"""Objects of a data set as its files annotate them: COCO's format and YOLO's segmentation labels.

What cannot be trained on is left out and counted; what makes a whole file doubtful is an error.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitadapter_zoo.errors import DatasetError
from vitadapter_zoo.evaluation import ids, values
from vitadapter_zoo.evaluation.annotation_file import without_super_categories
from vitadapter_zoo.evaluation.ids import Id
from vitadapter_zoo.text import PATH, JSONError, parse_json, quoted, repr_of, shown
from vitadapter_zoo.training.masks import pixels_of

Box = tuple[float, float, float, float]

# Reasons for which objects are left out, as they are counted and told.
NO_BOX = "objects whose box is not four numbers"
OUTSIDE = "objects outside of their image"
ZERO_AREA = "objects without an area"
NO_MASK = "objects without a mask"
OTHER_SIZE = "objects whose mask has another size than their image"
DUPLICATE = "annotations that are there twice"


@dataclass(frozen=True)
class Instance:
    """One annotated object.

    Attributes:
        box: (x1, y1, x2, y2) in image pixels, inside the image.
        label: index of the class.
        segmentation: polygons ``[[x, y, x, y, ...], ...]`` in image pixels, or COCO's compressed
            RLE ``{"size": [height, width], "counts": text}``.
        area: of the mask in pixels as annotated; 0 where that is not said.
        crowd: whether it stands for a group; such are not trained on.
    """

    box: Box
    label: int
    segmentation: Any
    area: float = 0.0
    crowd: bool = False


@dataclass(frozen=True)
class Sample:
    """One image with its objects.

    Attributes:
        image_id: the annotation file's.
        path: of the image file.
        size: (height, width) in pixels; None where the annotations do not say.
        instances: its objects.
    """

    image_id: Id
    path: str
    size: tuple[int, int] | None
    instances: tuple[Instance, ...]


@dataclass(frozen=True)
class Split:
    """The images of one part of a data set, ``train`` or ``valid``.

    Attributes:
        source: the file that it was read from.
        folder: of the image files.
        classes: names, in the order of the labels.
        samples: all images, those without objects too.
        ignored: how many annotations were left out, by reason.
    """

    source: Path
    folder: Path
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]
    ignored: Counter[str]


def read_coco(source: Path, folder: Path, classes: tuple[str, ...] | None = None) -> Split:
    """Read an annotation file in COCO's instances format.

    Args:
        source: the file.
        folder: of the image files.
        classes: names that the labels number; the file's own by default, by category id.

    Raises:
        DatasetError: not readable, not in this format, with an image or category id twice, or
            with objects of a class that ``classes`` does not have.
    """
    content = _read_json(source)
    try:
        return _split(content, source, folder, classes)
    except DatasetError:
        raise
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise DatasetError(
            f"{shown(source, PATH)} is not in COCO's instances format ({type(error).__name__}: "
            f"{shown(error)}); export the data set again as COCO segmentation"
        ) from error


def _split(
    content: dict[str, Any], source: Path, folder: Path, classes: tuple[str, ...] | None
) -> Split:
    """The images and objects of parsed JSON; whatever is wrong with it is an error of Python."""
    file = shown(source, PATH)
    used = {_id(annotation["category_id"]) for annotation in content["annotations"]}
    names = _category_names(content, file)
    by_id = sorted(names, key=ids.order)
    ordered = tuple(names[key] for key in by_id) if classes is None else classes
    labels = _labels(names, ordered, used, file)
    ignored: Counter[str] = Counter()
    sizes = _image_sizes(content["images"], file)
    found: dict[Id, list[Instance]] = {key: [] for key in sizes}
    for annotation in _without_duplicates(content["annotations"], ignored):
        image_id, category_id = _id(annotation["image_id"]), _id(annotation["category_id"])
        if image_id not in sizes or category_id not in labels:
            raise DatasetError(
                f"an annotation of {file} names an image or class that the file does not have: "
                f"image {shown(image_id)}, category {shown(category_id)}; it was cut or edited, "
                "take the original file"
            )
        instance = _instance(annotation, labels[category_id], sizes[image_id])
        if isinstance(instance, str):
            ignored[instance] += 1
        else:
            found[image_id].append(instance)
    samples = []
    for image in content["images"]:
        image_id, name = _id(image["id"]), image["file_name"]
        if not ids.is_unicode(name) or "\0" in name:
            raise ValueError(f"image {shown(image_id)} has a file_name that no file can have")
        samples.append(
            Sample(image_id, str(folder / name), sizes[image_id], tuple(found[image_id]))
        )
    return Split(source, folder, ordered, tuple(samples), ignored)


def _id(value: Any) -> Id:
    """An id of the file, exactly as the evaluation reads it.

    Raises:
        ValueError: it cannot be one.
    """
    key = ids.read(value)
    if key is None:
        raise ValueError(f"{shown(repr_of(value))} is no id: that is a whole number or text")
    return key


def _read_json(source: Path) -> dict[str, Any]:
    try:
        content = parse_json(source.read_bytes())
    except OSError as error:
        raise DatasetError(
            f"cannot read the annotation file {shown(source, PATH)}: {error.strerror}; check the "
            "path"
        ) from error
    except JSONError as error:
        raise DatasetError(
            f"{shown(source, PATH)}: {error}; it is truncated or another kind of file: export it "
            "again"
        ) from error
    if not isinstance(content, dict) or "annotations" not in content:
        raise DatasetError(
            f"{shown(source, PATH)} has no annotations: it is not in COCO's instances format; "
            "export the data set again as COCO segmentation"
        )
    return content


def _category_names(content: dict[str, Any], file: str) -> dict[Id, str]:
    """Name by category id, without the categories that only group others."""
    names: dict[Id, str] = {}
    for category in without_super_categories(content["categories"], content["annotations"]):
        key, name = _id(category["id"]), category["name"]
        if isinstance(name, int) and not isinstance(name, bool):
            name = str(name)
        if not isinstance(name, str) or not name.strip() or not ids.is_unicode(name):
            raise DatasetError(f"category {shown(key)} of {file} has no name")
        if key in names:
            raise DatasetError(
                f"{file} has the category id {shown(repr(key))} twice; number them apart"
            )
        if name in names.values():
            raise DatasetError(
                f"{file} has two categories named {quoted(name)}; merge or rename one of them"
            )
        names[key] = name
    if not names:
        raise DatasetError(f"{file} has no categories; export the data set again with them")
    return names


def _labels(
    names: dict[Id, str], classes: tuple[str, ...], used: set[Id], file: str
) -> dict[Id, int]:
    """Label by category id. Categories without objects may lack one."""
    places = {name: label for label, name in enumerate(classes)}
    unknown = [names[key] for key in names if key in used and names[key] not in places]
    if unknown:
        raise DatasetError(
            f"{file} has objects of {', '.join(map(quoted, unknown[:3]))}, which the training "
            f"annotations lack (they have {', '.join(map(quoted, classes[:5]))}): use the same "
            "names in both"
        )
    return {key: places[name] for key, name in names.items() if name in places}


def _image_sizes(images: Sequence[dict[str, Any]], file: str) -> dict[Id, Any]:
    """(height, width) by image id; None where the file does not say."""
    sizes: dict[Id, tuple[int, int] | None] = {}
    for image in images:
        key = _id(image["id"])
        if key in sizes:
            raise DatasetError(
                f"{file} has the image id {shown(repr(key))} twice; number the images apart"
            )
        known = image.get("height") and image.get("width")
        sizes[key] = (int(image["height"]), int(image["width"])) if known else None
    return sizes


def _without_duplicates(
    annotations: Sequence[dict[str, Any]], ignored: Counter[str]
) -> list[dict[str, Any]]:
    """Without those that repeat another of the same id in everything that counts."""
    seen: dict[Any, list[dict[str, Any]]] = {}
    kept = []
    for annotation in annotations:
        same = seen.setdefault(annotation.get("id", id(annotation)), [])
        if annotation in same:
            ignored[DUPLICATE] += 1
            continue
        same.append(annotation)
        kept.append(annotation)
    return kept


def _instance(
    annotation: dict[str, Any], label: int, size: tuple[int, int] | None
) -> Instance | str:
    """The object, or the reason why it is left out; the rules for boxes are the original's."""
    segmentation = _segmentation(annotation.get("segmentation"), size)
    if isinstance(segmentation, str):
        return segmentation
    if annotation.get("bbox"):
        box = values.coordinates(annotation["bbox"])
        if box is None or len(box) != 4:
            return NO_BOX
        left, top, width, height = box
    else:
        left, top, width, height = _bounds(segmentation)
    area = annotation.get("area")
    area = math.nan if area is None else float(area)
    if math.isinf(area):
        return ZERO_AREA
    if not (width >= 1 and height >= 1) or area <= 0:
        return ZERO_AREA
    x1, y1, x2, y2 = max(left, 0.0), max(top, 0.0), left + width, top + height
    if size is not None:
        x2, y2 = min(x2, float(size[1])), min(y2, float(size[0]))
    if not (x2 > x1 and y2 > y1):
        return OUTSIDE
    crowd = bool(annotation.get("iscrowd", 0))
    return Instance((x1, y1, x2, y2), label, segmentation, 0.0 if math.isnan(area) else area, crowd)


def _segmentation(value: Any, size: tuple[int, int] | None) -> Any:
    """The mask in one of two forms, or the reason why the object is left out."""
    if isinstance(value, dict):
        height, width = (int(side) for side in value["size"])
        if size is not None and (height, width) != size:
            return OTHER_SIZE
        counts = value["counts"]
        if isinstance(counts, list):
            from hotcoco import mask

            if sum(counts) != height * width:
                return OTHER_SIZE
            counts = mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)[
                "counts"
            ]
        text = counts.decode() if isinstance(counts, bytes) else str(counts)
        if pixels_of(text) != height * width:
            return OTHER_SIZE
        return {"size": [height, width], "counts": text}
    polygons = [
        values.coordinates(polygon)
        for polygon in value or ()
        if len(polygon) >= 6 and len(polygon) % 2 == 0
    ]
    return NO_MASK if not polygons or None in polygons else polygons


def _bounds(segmentation: Any) -> Box:
    """The box around a mask as (x, y, width, height)."""
    if isinstance(segmentation, dict):
        from hotcoco import mask

        left, top, width, height = (float(x) for x in mask.to_bbox(segmentation))
        return left, top, width, height
    xs = [x for polygon in segmentation for x in polygon[0::2]]
    ys = [y for polygon in segmentation for y in polygon[1::2]]
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)


def read_yolo_labels(
    path: Path, size: tuple[int, int], labels: Mapping[int, int], ignored: Counter[str]
) -> tuple[Instance, ...]:
    """The objects of one label file of YOLO's segmentation format.

    A line is ``class x1 y1 x2 y2 x3 y3 ...`` with coordinates relative to the image's sides.

    Args:
        path: the file; where there is none, the image has no objects.
        size: (height, width) of the image in pixels.
        labels: the model's label by the class number in the file.
        ignored: counts what is left out.

    Raises:
        DatasetError: a line is not of this form, or its class has no name.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"cannot read the labels {shown(path, PATH)}: {shown(error)}; export them again"
        ) from error
    height, width = size
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            first, *relative = (float(x) for x in line.split())
            number_of_class = int(first)
        except (ValueError, OverflowError) as error:
            raise DatasetError(
                f"line {number} of {shown(path, PATH)} is not `class x1 y1 x2 y2 x3 y3 ...`: "
                f"{quoted(line)}; "
                "export the data set again as YOLO segmentation"
            ) from error
        if number_of_class != first or number_of_class not in labels:
            raise DatasetError(
                f"line {number} of {shown(path, PATH)} has class {first:g}, but data.yaml names "
                f"{len(labels)} classes, {min(labels)} to {max(labels)}; correct one of them"
            )
        scale = (width, height)
        polygon = [x * scale[place % 2] for place, x in enumerate(relative)]
        instance = _instance({"segmentation": [polygon]}, labels[number_of_class], size)
        if isinstance(instance, str):
            ignored[instance] += 1
        else:
            found.append(instance)
    return tuple(found)
