"""Data sets in COCO's format: what is checked before an hour of computing, and parts of them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitadapter_zoo.catalog import COCO_CLASSES, Row
from vitadapter_zoo.errors import DatasetError

ANNOTATIONS = "annotations/instances_val2017.json"
IMAGES = "val2017"
# Of val2017, the set that the published figures belong to: images and annotations, crowds included.
VAL2017 = (5000, 36_781)


@dataclass(frozen=True)
class Image:
    """One image of a data set.

    Attributes:
        image_id: the annotation file's.
        path: of the image file.
        size: (height, width) in pixels, as the annotation file says.
        category_ids: classes annotated in it, each once.
    """

    image_id: int
    path: Path
    size: tuple[int, int]
    category_ids: frozenset[int]


@dataclass(frozen=True)
class Dataset:
    """A data set in COCO's format; ``read_dataset`` makes and checks it.

    Attributes:
        annotations: the annotation file.
        sha256: of the annotation file.
        images: in the order of their ids.
        categories: (id, name) of every class, in the file's order.
        annotation_count: objects and crowds in all.
        folder: of the image files.
    """

    annotations: Path
    sha256: str
    images: tuple[Image, ...]
    categories: tuple[tuple[int, str], ...]
    annotation_count: int
    folder: Path

    @property
    def is_val2017(self) -> bool:
        """Whether this is, by its numbers and classes, what the published figures belong to."""
        counts = (len(self.images), self.annotation_count)
        names = {name for _, name in self.categories}
        return counts == VAL2017 and names == set(COCO_CLASSES)

    def is_measured(self, row: Row) -> bool:
        """Whether the row's figures are of this data set."""
        if row.data_files is None:
            return self.is_val2017
        return self.sha256 == hashlib.sha256(row.data_files[0].read_bytes()).hexdigest()

    def category_ids(self, classes: Sequence[str]) -> tuple[int, ...]:
        """The category id of each of a model's classes, in the model's order.

        Raises:
            DatasetError: the file's classes are not the model's.
        """
        ids = {name: key for key, name in self.categories}
        absent = [name for name in classes if name not in ids]
        extra = [name for name in ids if name not in set(classes)]
        if absent or extra:
            raise DatasetError(
                f"{self.annotations} has {len(ids)} classes and the model {len(classes)}: "
                f"{_some('only the model has', absent)}{_some('only the file has', extra)}"
                "take the annotations that the model was trained for, or remove what is no class "
                "of its (a background, for instance)"
            )
        return tuple(ids[name] for name in classes)


def row_dataset(row: Row) -> Dataset:
    """The data set that the row's figures are of, where this package carries it.

    Raises:
        DatasetError: the figures are of COCO's val2017, which is not in the package.
    """
    if row.data_files is None:
        raise DatasetError(
            f"the published figures of {row.name} belong to COCO val2017, which is not in this "
            "package: give its folder with --coco DIR, or other data with --annotations FILE"
        )
    return read_dataset(*row.data_files)


def coco_paths(directory: Path) -> tuple[Path, Path]:
    """Annotation file and image folder of val2017 in COCO's usual layout.

    Raises:
        DatasetError: they are not there; the message names what is there instead.
    """
    annotations, images = directory / ANNOTATIONS, directory / IMAGES
    if annotations.is_file() and images.is_dir():
        return annotations, images
    lacking = annotations if not annotations.is_file() else images
    there = sorted(path.name for path in (directory / "annotations").glob("*.json"))
    hint = f" (annotations/ has {', '.join(there[:5])})" if there else ""
    raise DatasetError(
        f"{lacking} is not there{hint}: the published figures belong to COCO val2017, so "
        f"{directory} must hold {ANNOTATIONS} and {IMAGES}/; for other data give --annotations "
        "and --images"
    )


def read_dataset(annotations: Path, images: Path) -> Dataset:
    """Read an annotation file and check it.

    Args:
        annotations: in COCO's instances format.
        images: the folder of the image files. Whether they are there is not checked here.

    Raises:
        DatasetError: not readable, not in COCO's format, without annotations or without masks.
    """
    try:
        encoded = annotations.read_bytes()
        content = json.loads(encoded)
    except OSError as error:
        raise DatasetError(
            f"cannot read the annotation file {annotations}: {error.strerror}; give COCO's folder "
            "with --coco or the file with --annotations"
        ) from error
    except ValueError as error:
        raise DatasetError(
            f"{annotations} is not JSON ({error}): it is truncated or another kind of file; "
            "unpack or download it again"
        ) from error
    try:
        _check(content, annotations)
        found: dict[int, set[int]] = {image["id"]: set() for image in content["images"]}
        for annotation in content["annotations"]:
            found[annotation["image_id"]].add(annotation["category_id"])
        entries = [
            Image(
                image["id"],
                images / image["file_name"],
                (int(image["height"]), int(image["width"])),
                frozenset(found[image["id"]]),
            )
            for image in content["images"]
        ]
        categories = tuple((int(c["id"]), str(c["name"])) for c in content["categories"])
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(
            f"{annotations} is not in COCO's instances format ({type(error).__name__}: {error}); "
            f"take {Path(ANNOTATIONS).name} or a file of its form"
        ) from error
    return Dataset(
        annotations=annotations,
        sha256=hashlib.sha256(encoded).hexdigest(),
        images=tuple(sorted(entries, key=lambda image: image.image_id)),
        categories=categories,
        annotation_count=len(content["annotations"]),
        folder=images,
    )


def _check(content: dict[str, Any], path: Path) -> None:
    """What hotcoco would take silently and score wrongly."""
    if "annotations" not in content and "images" in content:
        raise DatasetError(
            f"{path} holds no annotations: test sets are scored by COCO's own server alone; "
            f"take {Path(ANNOTATIONS).name}"
        )
    image_ids = _unique("image", (image["id"] for image in content["images"]), path)
    category_ids = _unique("category", (c["id"] for c in content["categories"]), path)
    _unique("category name", (c["name"] for c in content["categories"]), path)
    _unique("annotation", (a["id"] for a in content["annotations"]), path)
    for annotation in content["annotations"]:
        name = f"annotation {annotation['id']} of {path}"
        if not annotation.get("segmentation"):
            raise DatasetError(
                f"{name} has no mask: mask AP needs a segmentation for every object; take an "
                "instances file (captions and keypoints have none)"
            )
        if annotation["image_id"] not in image_ids or annotation["category_id"] not in category_ids:
            raise DatasetError(
                f"{name} names an image or class that the file does not have; it was cut or "
                "edited: take the original file"
            )
        if annotation["iscrowd"] not in (0, 1) or len(annotation["bbox"]) != 4:
            raise DatasetError(f"{name} has no valid iscrowd and bbox; take the original file")
        if not isinstance(annotation["area"], (int, float)):
            raise DatasetError(f"{name} has no area; take the original file")


def _unique(kind: str, keys: Iterable[Any], path: Path) -> set[Any]:
    seen: set[Any] = set()
    for key in keys:
        if key in seen:
            raise DatasetError(f"{path} has the {kind} {key!r} twice; take the original file")
        seen.add(key)
    return seen


def check_images(images: Sequence[Image]) -> list[Image]:
    """Those of ``images`` whose files are not there."""
    return [image for image in images if not image.path.is_file()]


def sampling_order(dataset: Dataset, seed: int) -> list[Image]:
    """All images in an order of which every beginning is a stratified random sample.

    Each image belongs to the stratum of its rarest class, so that rare classes are represented;
    images without objects are one more. Within a stratum of s images the places (k + u) / s,
    k = 0..s-1, go to the images at random; u is uniform on 0..1 for each stratum. Sorted by place,
    the first n images hold n s / N of each stratum, up to rounding, and every image is equally
    likely to be among them.

    Args:
        dataset: what is sampled.
        seed: the same seed gives the same order.
    """
    frequency: dict[int, int] = {}
    for image in dataset.images:
        for key in image.category_ids:
            frequency[key] = frequency.get(key, 0) + 1
    strata: dict[int, list[Image]] = {}
    for image in dataset.images:
        rarest = min(image.category_ids, key=lambda key: (frequency[key], key), default=-1)
        strata.setdefault(rarest, []).append(image)
    generator = random.Random(seed)  # noqa: S311  sampling, not secrets
    placed = []
    for key in sorted(strata):
        members = strata[key]
        generator.shuffle(members)
        start = generator.random()
        placed += [((k + start) / len(members), image) for k, image in enumerate(members)]
    return [image for _, image in sorted(placed, key=lambda pair: (pair[0], pair[1].image_id))]


def _some(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {', '.join(map(repr, names[:3]))}{more}; "
