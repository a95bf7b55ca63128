"""Data sets in COCO's format: reading and checking them, and random samples of their images."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitadapter_zoo import settings
from vitadapter_zoo.catalog import COCO_CLASSES, Row
from vitadapter_zoo.errors import DatasetError
from vitadapter_zoo.evaluation import annotation_file, ids
from vitadapter_zoo.evaluation.annotation_file import Image as Image
from vitadapter_zoo.evaluation.annotation_file import Object
from vitadapter_zoo.evaluation.ids import Id
from vitadapter_zoo.text import JSONError, parse_json, shown

ANNOTATIONS = "annotations/instances_val2017.json"
IMAGES = "val2017"
# Numbers of images and annotations of val2017, to which the published figures belong.
VAL2017 = (5000, 36_781)


@dataclass(frozen=True)
class Dataset:
    """A data set in COCO's format; ``read_dataset`` makes and checks it.

    Attributes:
        annotations: the annotation file.
        sha256: of the annotation file.
        images: in the order of their ids.
        categories: (id, name) of every class, in the file's order.
        objects: every annotation, in the file's order.
        folder: of the image files.
        ignore_exif: whether image files are read without the rotation of their EXIF data.
    """

    annotations: Path
    sha256: str
    images: tuple[Image, ...]
    categories: tuple[tuple[Id, str], ...]
    objects: tuple[Object, ...]
    folder: Path
    ignore_exif: bool = False

    @property
    def is_val2017(self) -> bool:
        """Whether this is COCO val2017, by the numbers of images and objects and the classes."""
        counts = (len(self.images), len(self.objects))
        names = {name for _, name in self.categories}
        return counts == VAL2017 and names == set(COCO_CLASSES)

    def is_measured(self, row: Row) -> bool:
        """Whether the row's published figures were measured on this data set."""
        if row.data_files is None:
            return self.is_val2017
        return self.sha256 == hashlib.sha256(row.data_files[0].read_bytes()).hexdigest()

    def category_ids(self, classes: Sequence[str]) -> tuple[Id, ...]:
        """Return the category id of each class of a model, in the model's order.

        Raises:
            DatasetError: the file's classes are not the model's.
        """
        ids = {name: key for key, name in self.categories}
        absent = [name for name in classes if name not in ids]
        extra = [name for name in ids if name not in set(classes)]
        if absent or extra:
            raise DatasetError(
                f"{shown(self.annotations, 300)} has {len(ids)} classes and the model "
                f"{len(classes)}: "
                f"{_some('only the model has', absent)}{_some('only the file has', extra)}"
                "take the annotations that the model was trained for, or remove the classes that "
                "it does not have (a background class, for instance)"
            )
        return tuple(ids[name] for name in classes)


def row_dataset(row: Row) -> Dataset:
    """Read the data set of the row's published figures, if it is in this package.

    Raises:
        DatasetError: the figures are of COCO's val2017, which is not in the package; or the row
            has none.
    """
    if row.network is not None:
        raise DatasetError(
            f"no data set belongs to {row.name}: give COCO's folder with --coco DIR, or other data "
            "with --annotations FILE"
        )
    if row.data_files is None:
        raise DatasetError(
            f"the published figures of {row.name} belong to COCO val2017, which is not in this "
            "package: give its folder with --coco DIR, or other data with --annotations FILE"
        )
    return read_dataset(*row.data_files)


def coco_paths(directory: Path) -> tuple[Path, Path]:
    """Return annotation file and image folder of val2017 in COCO's usual layout.

    Raises:
        DatasetError: they are missing; the message lists what the folder has instead.
    """
    directory = settings.expanded(directory)
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


def read_dataset(annotations: Path, images: Path, *, ignore_exif: bool = False) -> Dataset:
    """Read an annotation file and check everything that is scored.

    Args:
        annotations: in COCO's instances format; UTF-8, UTF-16 or UTF-32.
        images: the folder of the image files. Whether they are there is not checked here.
        ignore_exif: whether the annotations belong to the pixels as they are stored, without the
            rotation that a file's EXIF data ask for.

    Raises:
        DatasetError: not readable, not in COCO's format, without annotations or without masks.
    """
    annotations, images = settings.expanded(annotations), settings.expanded(images)
    file = shown(annotations, 300)
    try:
        encoded = annotations.read_bytes()
    except OSError as error:
        raise DatasetError(
            f"cannot read the annotation file {file}: {error.strerror}; give COCO's folder with "
            "--coco or the file with --annotations"
        ) from error
    try:
        content = parse_json(encoded)
    except JSONError as error:
        raise DatasetError(
            f"{file}: {error}; it is truncated or another kind of file: unpack or download it again"
        ) from error
    found = annotation_file.parse(content, annotations, images)
    return Dataset(
        annotations=annotations,
        sha256=hashlib.sha256(encoded).hexdigest(),
        images=found.images,
        categories=found.categories,
        objects=found.objects,
        folder=images,
        ignore_exif=ignore_exif,
    )


def check_images(images: Sequence[Image]) -> list[Image]:
    """Return the images whose files are missing."""
    return [image for image in images if not image.path.is_file()]


def sampling_order(dataset: Dataset, seed: int) -> list[Image]:
    """Order the images so that, for every n, the first n are a stratified random sample.

    Each image belongs to the stratum of its rarest class, so that rare classes are represented;
    images without objects are a stratum of their own. Within a stratum of s images the places
    (k + u) / s, k = 0..s-1, are given to the images at random; u is uniform on 0..1 for each
    stratum. Sorted by place, the first n of N images have n s / N of each stratum, up to rounding,
    and every image is equally likely to be among them.

    Args:
        dataset: the data set.
        seed: the same seed gives the same order.
    """
    rank = {key: place for place, key in enumerate(sorted(dict(dataset.categories), key=ids.order))}
    frequency: dict[Id, int] = {}
    for image in dataset.images:
        for key in image.category_ids:
            frequency[key] = frequency.get(key, 0) + 1
    strata: dict[int, list[tuple[int, Image]]] = {}
    for place, image in enumerate(dataset.images):
        rarest = min(((frequency[key], rank[key]) for key in image.category_ids), default=(0, -1))
        strata.setdefault(rarest[1], []).append((place, image))
    generator = random.Random(seed)  # noqa: S311  sampling, not secrets
    placed = []
    for stratum in sorted(strata):
        members = strata[stratum]
        generator.shuffle(members)
        start = generator.random()
        placed += [((k + start) / len(members), *member) for k, member in enumerate(members)]
    return [image for _, _, image in sorted(placed, key=lambda entry: entry[:2])]


def _some(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {', '.join(shown(repr(name)) for name in names[:3])}{more}; "
