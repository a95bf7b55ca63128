"""Annotation files in COCO's instances format, read and checked; nothing else reaches the scorer.

A file that a second parser reads again may be understood in two ways. Here it is read once, what is
not needed (info, licences, captions) is not looked at, and what cannot be scored is one error with
the id of the annotation, before the first image is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitadapter_zoo.errors import DatasetError
from vitadapter_zoo.evaluation import ids, masks, values
from vitadapter_zoo.evaluation.ids import Id
from vitadapter_zoo.text import shown

EXAMPLE = "instances_val2017.json"
LARGEST_AREA = 1e18  # pixels; more is a mistake
LARGEST_IMAGE = 2**31 - 1  # pixels; run lengths are 32-bit integers


@dataclass(frozen=True)
class Image:
    """One image of a data set.

    Attributes:
        image_id: the annotation file's.
        path: of the image file.
        size: (height, width) in pixels, as the annotation file says.
        category_ids: classes annotated in it, each once.
    """

    image_id: Id
    path: Path
    size: tuple[int, int]
    category_ids: frozenset[Id]


@dataclass(frozen=True, slots=True)
class Object:
    """One annotation: an object, or a crowd.

    Attributes:
        annotation_id: the annotation file's.
        image_id: of the image that it is in.
        category_id: of its class.
        box: ``[x, y, width, height]`` in image pixels.
        area: in pixels, as the annotation file says; it decides between small, medium and large.
        is_crowd: whether it marks a group of objects, which is ignored if it is not found.
        mask: compressed RLE counts, of the image's size.
    """

    annotation_id: Id
    image_id: Id
    category_id: Id
    box: tuple[float, ...]
    area: float
    is_crowd: bool
    mask: bytes


@dataclass(frozen=True)
class Content:
    """The content of an annotation file.

    Attributes:
        images: in the order of their ids.
        categories: (id, name) of every class, in the file's order.
        objects: in the file's order.
    """

    images: tuple[Image, ...]
    categories: tuple[tuple[Id, str], ...]
    objects: tuple[Object, ...]


def parse(content: Any, path: Path, folder: Path) -> Content:
    """Check parsed JSON and extract the parts that are scored.

    Args:
        content: of the file.
        path: of the file, for messages.
        folder: of the image files.

    Raises:
        DatasetError: it is not in COCO's instances format, has no annotations or images, an id
            twice, or an object without a valid mask, box, area or iscrowd.
    """
    file = shown(path, 300)
    _check_form(content, file)
    categories = _categories(
        without_super_categories(content["categories"], content["annotations"]), file
    )
    sizes: dict[Id, tuple[int, int]] = {}
    paths: dict[Id, Path] = {}
    for place, entry in enumerate(content["images"]):
        key = _id(entry, "image", place, file, sizes)
        sizes[key] = _size(entry, f"image {shown(key)} of {file}")
        name = entry.get("file_name")
        if not isinstance(name, str) or not name or not ids.is_unicode(name):
            raise DatasetError(f"image {shown(key)} of {file} has no file_name")
        paths[key] = folder / name
    found: dict[Id, set[Id]] = {key: set() for key in sizes}
    known = dict(categories)
    objects = []
    seen: set[Id] = set()
    for place, entry in enumerate(content["annotations"]):
        key = _id(entry, "annotation", place, file, seen)
        seen.add(key)
        one = _object(entry, key, sizes, known, f"annotation {shown(key)} of {file}")
        found[one.image_id].add(one.category_id)
        objects.append(one)
    images = [Image(key, paths[key], size, frozenset(found[key])) for key, size in sizes.items()]
    images.sort(key=lambda image: ids.order(image.image_id))
    return Content(tuple(images), categories, tuple(objects))


def without_super_categories(
    categories: list[dict[str, Any]], annotations: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the categories without those that only group others, as Roboflow writes them.

    A category is left out if no object belongs to it and another category names it as its
    super-category.
    """
    used = {str(annotation.get("category_id")) for annotation in annotations}
    groups: dict[str, int] = {}
    for category in categories:
        name = str(category.get("supercategory"))
        groups[name] = groups.get(name, 0) + 1

    def only_groups(category: dict[str, Any]) -> bool:
        name = str(category.get("name"))
        itself = name == str(category.get("supercategory"))
        return str(category.get("id")) not in used and groups.get(name, 0) > itself

    return [category for category in categories if not only_groups(category)]


def _check_form(content: Any, file: str) -> None:
    if isinstance(content, list):
        raise DatasetError(
            f"{file} is a list, as result files are: give the annotation file here, and results "
            "to `vitadapter-zoo score`"
        )
    if not isinstance(content, dict):
        raise _no_instances(file, "it is not a JSON object")
    if "annotations" not in content and "images" in content:
        raise DatasetError(
            f"{file} holds no annotations: test sets are scored by COCO's own server alone; "
            f"take {EXAMPLE}"
        )
    for key in ("images", "annotations", "categories"):
        entries = content.get(key)
        if not isinstance(entries, list):
            raise _no_instances(file, f"it has no list of {key}")
        if not entries and key != "annotations":
            raise _no_instances(file, f"its list of {key} is empty")
        for place, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise _no_instances(file, f"entry {place} of its {key} is not an object")


def _no_instances(file: str, reason: str) -> DatasetError:
    return DatasetError(
        f"{file} is not in COCO's instances format ({reason}); take {EXAMPLE} or a file of its form"
    )


def _categories(entries: list[dict[str, Any]], file: str) -> tuple[tuple[Id, str], ...]:
    categories: dict[Id, str] = {}
    names: set[str] = set()
    for place, entry in enumerate(entries):
        key = _id(entry, "category", place, file, categories)
        name = entry.get("name")
        if isinstance(name, int):
            name = str(name)
        if not isinstance(name, str) or not name or not ids.is_unicode(name):
            raise DatasetError(f"category {shown(key)} of {file} has no name")
        if name in names:
            raise _twice(file, "category name", name)
        names.add(name)
        categories[key] = name
    return tuple(categories.items())


def _id(
    entry: dict[str, Any], kind: str, place: int, file: str, seen: dict[Id, Any] | set[Id]
) -> Id:
    if "id" not in entry:
        raise _no_instances(file, f"entry {place} of its {kind} list has no id")
    key = ids.read(entry["id"])
    if key is None:
        raise DatasetError(
            f"{file} has the {kind} id {shown(entry['id'])}; an id is a whole number or text"
        )
    if key in seen:
        raise _twice(file, kind, key)
    return key


def _twice(file: str, kind: str, key: Id) -> DatasetError:
    return DatasetError(f"{file} has the {kind} {shown(repr(key))} twice; take the original file")


def _size(entry: dict[str, Any], name: str) -> tuple[int, int]:
    sides = []
    for key in ("height", "width"):
        side = entry.get(key)
        if isinstance(side, float) and side.is_integer():
            side = int(side)
        if type(side) is not int or side < 1:
            raise DatasetError(f"{name} has no {key}: it must be a number of pixels above 0")
        sides.append(side)
    if sides[0] * sides[1] > LARGEST_IMAGE:
        raise DatasetError(
            f"{name} has a height and width of more than {LARGEST_IMAGE:,} pixels together"
        )
    return sides[0], sides[1]


def _object(
    entry: dict[str, Any],
    key: Id,
    sizes: dict[Id, tuple[int, int]],
    categories: dict[Id, str],
    name: str,
) -> Object:
    image_id, category_id = (ids.read(entry.get(part)) for part in ("image_id", "category_id"))
    if not entry.get("segmentation"):
        raise DatasetError(
            f"{name} has no mask: mask AP needs a segmentation for every object; take an "
            "instances file (captions and keypoints have none)"
        )
    if (
        image_id is None
        or image_id not in sizes
        or category_id is None
        or category_id not in categories
    ):
        raise DatasetError(
            f"{name} names an image or class that the file does not have; it was cut or "
            "edited: take the original file"
        )
    is_crowd, box = entry.get("iscrowd"), values.box(entry.get("bbox"))
    area = values.number(entry.get("area"), 0, LARGEST_AREA)
    if is_crowd not in (0, 1):
        raise DatasetError(f"{name} has no iscrowd of 0 or 1; take the original file")
    if area is None:
        raise DatasetError(f"{name} has no area in pixels; take the original file")
    if box is None:
        raise DatasetError(
            f"{name} has no bbox of four numbers [x, y, width, height] in pixels; take the "
            "original file"
        )
    try:
        mask = masks.compressed(entry["segmentation"], sizes[image_id])
    except masks.MaskError as error:
        raise DatasetError(f"{name} {error}") from error
    return Object(key, image_id, category_id, tuple(box), area, bool(is_crowd), mask)
