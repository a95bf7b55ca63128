"""Training data sets: detecting the layout, reading and checking."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitadapter_zoo.errors import DatasetError
from vitadapter_zoo.evaluation.ids import is_unicode
from vitadapter_zoo.settings import expanded
from vitadapter_zoo.text import PATH, quoted, repr_of, shown
from vitadapter_zoo.training.annotations import (
    NO_MASK,
    Sample,
    Split,
    read_coco,
    read_yolo_labels,
)

ROBOFLOW = "_annotations.coco.json"
VALIDATION_FOLDERS = ("valid", "val", "validation")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and its values that swap the sides

Source = tuple[str | os.PathLike[str], str | os.PathLike[str]]


@dataclass(frozen=True)
class TrainingData:
    """What ``read_data`` found; every image file is there and has the size that is annotated.

    Attributes:
        train: images to train on.
        valid: images to evaluate on; None where there are none.
        classes: names, in the order of the labels.
    """

    train: Split
    valid: Split | None
    classes: tuple[str, ...]


def read_data(
    data: str | os.PathLike[str] | None = None,
    *,
    train: Source | None = None,
    valid: Source | None = None,
    keep_empty: bool = False,
) -> TrainingData:
    """Read a data set for training and check it.

    Args:
        data: a folder: Roboflow's COCO export (``train/_annotations.coco.json``, ``valid/...``),
            COCO's layout (``annotations/instances_train*.json``), or YOLO segmentation
            (``data.yaml``).
        train: instead of ``data``, (annotation file in COCO's format, folder of images).
        valid: the same for evaluation.
        keep_empty: train on images without objects too; the original leaves them out.

    Raises:
        DatasetError: no such layout, or data that cannot be trained on; the message counts what
            is wrong and names an example.
    """
    if (data is None) == (train is None):
        raise DatasetError("give a data set's folder, or its annotation file and image folder")
    if train is not None:
        parts = [read_coco(expanded(train[0]), expanded(train[1]))]
        if valid is not None:
            parts.append(read_coco(expanded(valid[0]), expanded(valid[1]), parts[0].classes))
    else:
        parts = _read_folder(expanded(data or ""))
    checked = [_checked(part) for part in parts]
    for part in checked[1:]:
        if not any(sample.instances for sample in part.samples):
            raise DatasetError(
                f"{shown(part.source, PATH)} has no objects in its validation images (left out: "
                f"{counted(part.ignored) or 'none'}), so nothing can be evaluated: annotate them, "
                "or train without validation images by --train FILE DIR"
            )
    return TrainingData(
        _for_training(checked[0], keep_empty),
        checked[1] if len(checked) > 1 else None,
        parts[0].classes,
    )


def _read_folder(folder: Path) -> list[Split]:
    """The training part and, where there is one, the validation part."""
    if folder.name in ("data.yaml", "data.yml"):
        folder = folder.parent
    sources = _roboflow(folder) or _coco(folder)
    if sources:
        first = read_coco(*sources[0])
        return [first, *(read_coco(*source, first.classes) for source in sources[1:])]
    for name in ("data.yaml", "data.yml"):
        if (folder / name).is_file():
            return _read_yolo(folder / name)
    there = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else None
    found = (
        f"it holds {', '.join(map(shown, there)) or 'nothing'}"
        if there is not None
        else "no such folder"
    )
    raise DatasetError(
        f"{folder} is not a data set ({found}): it needs train/{ROBOFLOW} (Roboflow's COCO "
        "export), annotations/instances_train*.json (COCO) or data.yaml (YOLO segmentation); give "
        "other files with --train FILE DIR and --val FILE DIR"
    )


def _roboflow(folder: Path) -> list[tuple[Path, Path]]:
    parts = [folder / name for name in ("train", *VALIDATION_FOLDERS)]
    found = [(part / ROBOFLOW, part) for part in parts if (part / ROBOFLOW).is_file()]
    return found[:2] if found and found[0][1].name == "train" else []


def _coco(folder: Path) -> list[tuple[Path, Path]]:
    found = []
    for kind in ("train", "val"):
        files = sorted((folder / "annotations").glob(f"instances_{kind}*.json"))
        if len(files) > 1:
            raise DatasetError(
                f"{folder / 'annotations'} has {len(files)} files for {kind}: "
                f"{', '.join(shown(file.name) for file in files[:8])}; choose with "
                "--train FILE DIR and --val FILE DIR"
            )
        if files:
            found.append((files[0], _coco_images(folder, files[0])))
        elif kind == "train":
            return []
    return found


def _coco_images(folder: Path, annotations: Path) -> Path:
    """The folder of images of ``annotations/instances_NAME.json``: ``NAME`` or ``images``."""
    name = annotations.stem.removeprefix("instances_")
    places = [folder / name, folder / "images" / name, folder / "images"]
    for place in places:
        if place.is_dir():
            return place
    raise DatasetError(
        f"the images of {annotations} are not there: {places[0]} and {places[1]} do not exist; "
        "unpack them, or give the folder with --train FILE DIR"
    )


def _read_yolo(source: Path) -> list[Split]:
    import yaml

    try:
        content = yaml.safe_load(source.read_text(encoding="utf-8"))
        names = content["names"]
        if not isinstance(names, dict):
            names = dict(enumerate(names))
        # Some data sets number their classes as COCO does, with gaps.
        classes = {_class_number(key): _plain(names[key]) for key in names}
        train, valid = (_entries(content.get(key)) for key in ("train", "val"))
        valid = valid or _entries(content.get("valid"))
        root = source.parent / _plain(content.get("path") or "")
    except (
        OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, yaml.YAMLError,
    ) as error:  # fmt: skip
        raise DatasetError(
            f"{shown(source, PATH)} is not a YOLO data set ({type(error).__name__}: "
            f"{shown(error, PATH)}): it needs train, val and names"
        ) from error
    if not classes or len(set(classes.values())) < len(names):
        listed = ", ".join(map(quoted, [*classes.values()][:8]))
        raise DatasetError(f"{shown(source, PATH)} names no class, or a class twice: {listed}")
    ordered = dict(sorted(classes.items()))
    parts = [_yolo_part(source, root, train, ordered)]
    if valid:
        parts.append(_yolo_part(source, root, valid, ordered))
    return parts


def _class_number(key: Any) -> int:
    """A key of ``names`` in ``data.yaml``: a number, or the text of one."""
    number = int(_plain(key))
    if number < 0 or isinstance(key, (bool, float)):
        raise ValueError(f"{quoted(str(key))} is not the number of a class")
    return number


def _plain(value: Any) -> str:
    """A text or number of a YAML file as text.

    Aliases in YAML can make a small file an enormous structure, whose text is never made.
    """
    if not isinstance(value, (str, int, float)) or not is_unicode(str(value)):
        raise ValueError(f"{shown(repr_of(value))} is not a text")
    return str(value)


def _entries(value: Any) -> list[str]:
    """The folders or lists of images that YOLO's ``train`` or ``val`` names."""
    if value is None:
        return []
    return [_plain(one) for one in (value if isinstance(value, list) else [value])]


def _yolo_part(source: Path, root: Path, entries: list[str], classes: dict[int, str]) -> Split:
    """The images that the entries name; ``classes`` are names by the labels' numbers."""
    paths = [path for entry in entries for path in _yolo_images(source, root, entry)]
    if not paths:
        listed = ", ".join(map(quoted, entries[:4])) or "train"
        raise DatasetError(f"{shown(source, PATH)} has no images in {listed}; unpack them there")
    ignored: Counter[str] = Counter()
    samples = []
    labels = {number: label for label, number in enumerate(classes)}
    for number, (path, size) in enumerate(zip(paths, _file_sizes(paths), strict=True), 1):
        if isinstance(size, str):
            raise DatasetError(f"{shown(path, PATH)} is {size}; restore the file, or remove it")
        instances = read_yolo_labels(_yolo_label(path), size, labels, ignored)
        samples.append(Sample(number, str(path), size, instances))
    if ignored[NO_MASK] and not any(sample.instances for sample in samples):
        raise DatasetError(
            f"the labels of {shown(source, PATH)} are boxes, not masks: export the data set as "
            "YOLO segmentation, with polygons"
        )
    folder = paths[0].parent if len({path.parent for path in paths}) == 1 else root
    return Split(source, folder.absolute(), tuple(classes.values()), tuple(samples), ignored)


def _yolo_images(source: Path, root: Path, entry: str) -> list[Path]:
    """The images of a folder, or those that a text file lists."""
    # Roboflow writes ../train/images for what lies beside data.yaml.
    places = [root / entry, source.parent / entry, source.parent / entry.removeprefix("../")]
    places = [expanded(place) for place in places]
    for place in places:
        if place.is_dir():
            files = sorted(path for path in place.rglob("*") if path.is_file())
            return [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
        if place.is_file():
            return _listed_images(place)
    raise DatasetError(
        f"{shown(source, PATH)} names {quoted(entry)}, but {shown(places[0], PATH)} is not there; "
        "unpack it there"
    )


def _listed_images(file: Path) -> list[Path]:
    """The images that the lines of a text file name."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"cannot read the list of images {shown(file, PATH)}: {shown(error)}; export it again"
        ) from error
    return [expanded(file.parent / line) for line in lines if line.strip()]


def _yolo_label(image: Path) -> Path:
    """``.../labels/NAME.txt`` of ``.../images/NAME.jpg``."""
    parts = list(image.parts)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _checked(split: Split) -> Split:
    """With the files' sizes.

    Raises:
        DatasetError: files that are missing, damaged or of another size than annotated.
    """
    paths = [Path(sample.path) for sample in split.samples]
    if not paths:
        raise DatasetError(f"{shown(split.source, PATH)} has no images; export the data set again")
    wrong: dict[str, list[str]] = {}
    samples = []
    for sample, size in zip(split.samples, _file_sizes(paths), strict=True):
        if isinstance(size, str):
            wrong.setdefault(size, []).append(shown(sample.path, PATH))
        elif sample.size is not None and sample.size != size:
            wrong.setdefault("of another size than annotated", []).append(
                f"{shown(sample.path, PATH)} ({size[1]} x {size[0]} instead of "
                f"{sample.size[1]} x {sample.size[0]})"
            )
        else:
            samples.append(replace(sample, size=size))
    if wrong:
        faults = "; ".join(
            f"{len(names):,} {'is' if len(names) == 1 else 'are'} {reason}, {names[0]} for instance"
            for reason, names in wrong.items()
        )
        raise DatasetError(
            f"of the {len(paths):,} images of {shown(split.source, PATH)}, {faults}: restore the "
            "files, or remove them from the annotations"
        )
    return replace(split, samples=tuple(samples))


def _file_sizes(paths: Sequence[Path]) -> Iterable[tuple[int, int] | str]:
    """(height, width) of each image with its EXIF rotation, or what is wrong with the file."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(_file_size, paths, chunksize=64))


def _file_size(path: Path) -> tuple[int, int] | str:
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
            if image.getexif().get(ORIENTATION) in SIDEWAYS:
                width, height = height, width
            return height, width
    except FileNotFoundError:
        return "missing"
    # Pillow's decoders raise whatever their arithmetic does on a damaged header.
    except Exception:
        return "damaged"


def _for_training(split: Split, keep_empty: bool) -> Split:
    """Without crowds, and without the images that nothing is left of.

    Raises:
        DatasetError: nothing is left at all.
    """
    ignored = Counter(split.ignored)
    samples = []
    for sample in split.samples:
        kept = tuple(one for one in sample.instances if not one.crowd)
        ignored["crowds"] += len(sample.instances) - len(kept)
        if kept or keep_empty:
            samples.append(replace(sample, instances=kept))
        else:
            ignored["images without objects"] += 1
    if not any(sample.instances for sample in samples):
        raise DatasetError(
            f"{shown(split.source, PATH)} has no objects to train on (left out: "
            f"{counted(+ignored) or 'none'}): export the data set with its annotations"
        )
    return replace(split, samples=tuple(samples), ignored=+ignored)


def counted(ignored: Counter[str]) -> str:
    """The reasons with their numbers, most frequent first."""
    return ", ".join(f"{reason} ({number:,})" for reason, number in ignored.most_common())


def described(split: Split, name: str) -> str:
    """One line that says what a part of the data set holds and what was left out."""
    objects = Counter(one.label for sample in split.samples for one in sample.instances)
    empty = [name for label, name in enumerate(split.classes) if label not in objects]
    line = f"{name}: {len(split.samples):,} images, {sum(objects.values()):,} objects"
    if empty:
        listed = ", ".join(shown(name, 40) for name in empty[:5])
        line += f"; no objects of {listed}{', ...' if len(empty) > 5 else ''}"
    return line + (f"; left out: {counted(split.ignored)}" if split.ignored else "")


def write_coco(split: Split, target: Path) -> None:
    """Write what is left of a part in COCO's format, for ``read_dataset`` and the scorer."""
    from hotcoco import mask

    annotations: list[dict[str, Any]] = []
    for sample in split.samples:
        height, width = sample.size or (0, 0)
        for one in sample.instances:
            x1, y1, x2, y2 = one.box
            rle = one.segmentation
            if not isinstance(rle, dict):
                rle = mask.merge(mask.frPyObjects(rle, height, width))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": sample.image_id,
                    "category_id": one.label + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": one.area or float(mask.area(rle)),
                    "iscrowd": int(one.crowd),
                    "segmentation": one.segmentation,
                }
            )
    folder = split.folder.absolute()
    images = [
        {
            "id": sample.image_id,
            "file_name": os.path.relpath(Path(sample.path).absolute(), folder),
            "height": (sample.size or (0, 0))[0],
            "width": (sample.size or (0, 0))[1],
        }
        for sample in split.samples
    ]
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(split.classes)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    from vitadapter_zoo.weights import atomic

    atomic.write_text(target, json.dumps(content))
