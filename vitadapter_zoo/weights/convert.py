"""From any published container to safetensors, and back to the original code's ``.pth``."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from vitadapter_zoo.catalog import COCO_CLASSES, PUBLISHED, Row
from vitadapter_zoo.errors import CheckpointError, ConfigError, ZooError
from vitadapter_zoo.models import MaskRCNN, build
from vitadapter_zoo.text import shown
from vitadapter_zoo.weights import atomic, checkpoint
from vitadapter_zoo.weights import fit as fitting
from vitadapter_zoo.weights.checkpoint import Checkpoint
from vitadapter_zoo.weights.fit import Fitted
from vitadapter_zoo.weights.shards import MOST_CLASSES

logger = logging.getLogger(__name__)

CLASS_BIAS = "roi_head.bbox_head.fc_cls.bias"  # one value for each class and the background


@dataclass(frozen=True)
class Converted:
    """The kind of a source file, and the changes made to its tensors.

    Attributes:
        container: torch zip, legacy torch pickle or safetensors.
        cast: dtypes that were converted, with how many tensors each.
        filled: parameters absent from the source that were filled in.
        removed: prefixes that were removed from names, such as ``module.``.
        metadata: the training framework's plain metadata.
        classes: number of classes of the heads.
    """

    container: str
    cast: dict[str, int]
    filled: list[str]
    removed: list[str]
    metadata: dict[str, str | int | float]
    classes: int


def to_safetensors(
    paths: list[Path],
    origin: str,
    row: Row,
    target: Path,
    *,
    sha256: str,
    dtype: torch.dtype | None = None,
    classes: Sequence[str] | None = None,
    allow_nonfinite: bool = False,
    more: Mapping[str, Tensor] | None = None,
) -> Converted:
    """Write the weights of one row as safetensors.

    Sources are memory-mapped, so the weights are in memory once at most. The number of classes is
    the file's.

    Args:
        paths: the source file, or the shards that it consists of.
        origin: what errors and metadata call it.
        row: the row that the weights must fit, strictly, but for the number of classes.
        target: file to write; it is replaced in one step.
        sha256: hash of the source, for the metadata; of shards, as ``atomic.sha256_of_all`` has it.
        dtype: floating-point type to store; float32 by default.
        classes: names of the classes; the file's own, or COCO's, by default.
        allow_nonfinite: accept NaN and infinite values.
        more: tensors that the source refers to, by their names in the detector.

    Raises:
        CheckpointError: damaged, unsafe, not the row's weights, or too large for ``dtype``.
        ZooError: the target cannot be written.
    """
    loaded, fitted, categories = _fitted(paths, origin, row, classes, allow_nonfinite, more)
    metadata = {
        "format": "pt",
        "model": row.name,
        "source": origin,
        "source_sha256": sha256,
        "license": row.license,
        "training": json.dumps(loaded.metadata),
    }
    if categories and categories != COCO_CLASSES:
        metadata["classes"] = json.dumps(categories)
    tensors = _cast(fitted.tensors, dtype, allow_nonfinite)
    write_safetensors(tensors, target, metadata)
    return _converted(loaded, fitted)


def to_mmdet(
    paths: list[Path],
    origin: str,
    row: Row,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    classes: Sequence[str] | None = None,
    allow_nonfinite: bool = False,
) -> Converted:
    """Write the weights of one row as mmdet's ``.pth``, which the original code loads strictly.

    Every parameter of the original network is there, in its order, under its name, with the class
    names and what is known of the training in ``meta``.

    Args:
        paths: the source file, or the shards that it consists of.
        origin: what errors call it.
        row: the row that the weights must fit, strictly, but for the number of classes.
        target: file to write; it is replaced in one step.
        dtype: floating-point type to store; float32 by default.
        classes: names of the classes; the file's own, or COCO's, by default.
        allow_nonfinite: accept NaN and infinite values.

    Raises:
        CheckpointError: damaged, unsafe, not the row's weights, or too large for ``dtype``.
        ZooError: the target cannot be written.
        ConfigError: a detector around a timm model, which the original code does not have.
    """
    if row.network is not None:
        raise ConfigError(
            f"{row.name} is a detector around a timm model, which mmdet 2.x does not have: convert "
            "it to safetensors"
        )
    loaded, fitted, categories = _fitted(paths, origin, row, classes, allow_nonfinite)
    meta = {**loaded.metadata, **({"CLASSES": categories} if categories else {})}
    tensors = _cast(fitted.tensors, dtype, allow_nonfinite)
    with atomic.replacing(target) as partial:
        atomic.check_space(target.parent, _size(tensors))
        try:
            torch.save({"meta": meta, "state_dict": tensors}, partial)
        except RuntimeError as error:  # torch's way to report a full disk
            reason = str(error).partition("\n")[0]
            raise ZooError(f"cannot write {target}: {reason}; make room and try again") from error
    return _converted(loaded, fitted)


def write_safetensors(
    tensors: Mapping[str, Tensor], target: Path, metadata: dict[str, str]
) -> None:
    """Write a safetensors file atomically.

    Raises:
        ZooError: the target cannot be written.
    """
    with atomic.replacing(target) as partial:
        atomic.check_space(target.parent, _size(tensors))
        try:
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            safetensors.torch.save_file(contiguous, partial, metadata)
        except safetensors.SafetensorError as error:  # a full disk too
            raise ZooError(
                f"cannot write the converted weights to {target.parent}: {error}; make room there "
                "(`vitadapter-zoo cache prune`) and try again"
            ) from error


def class_names(
    loaded: Checkpoint, row: Row, classes: Sequence[str] | None = None
) -> tuple[str, ...] | int:
    """Return the class names of a checkpoint, or their number if the names are unknown.

    Args:
        loaded: the checkpoint.
        row: its row, whose class names are used if the file has none and as many classes.
        classes: names to use instead, if their number is the file's.
    """
    bias = next((x for name, x in loaded.tensors.items() if name.endswith(CLASS_BIAS)), None)
    count = bias.shape[0] - 1 if bias is not None and bias.ndim == 1 else len(COCO_CLASSES)
    if not 0 < count <= MOST_CLASSES:
        count = len(COCO_CLASSES)
    for names in (classes, loaded.classes, row.classes, COCO_CLASSES):
        if names and len(names) == count:
            is_coco = [x.casefold() for x in names] == list(COCO_CLASSES)
            return COCO_CLASSES if is_coco else tuple(names)
    return count


def fit(
    loaded: Checkpoint, row: Row, model: MaskRCNN, origin: str, *, allow_nonfinite: bool = False
) -> Fitted:
    """``weights.fit.fit`` with the catalog's knowledge in its error: which row would fit.

    Raises:
        CheckpointError: the tensors are not the model's, or not finite.
    """
    origin = shown(origin, 300)
    expected = model.state_dict()
    try:
        fitted = fitting.fit(loaded.tensors, expected, row.name, allow_nonfinite=allow_nonfinite)
    except CheckpointError as error:
        hint = _what_it_is(loaded.tensors, row, model.categories)
        raise CheckpointError(f"{origin}: {error}{hint}") from error
    if fitted.filled:
        logger.warning(
            "%s lacks %d parameters that change nothing (%s, ...): filled",
            origin,
            len(fitted.filled),
            fitted.filled[0],
        )
    if fitted.removed:
        prefixes = ", ".join(shown(prefix) for prefix in fitted.removed)
        logger.warning("%s: the prefixes %s were removed from the names", origin, prefixes)
    if fitted.ignored:
        names = ", ".join(shown(name) for name in fitted.ignored[:4])
        logger.warning("%s: %d entries were ignored: %s", origin, len(fitted.ignored), names)
    return fitted


def _fitted(
    paths: list[Path],
    origin: str,
    row: Row,
    classes: Sequence[str] | None,
    allow_nonfinite: bool,
    more: Mapping[str, Tensor] | None = None,
) -> tuple[Checkpoint, Fitted, tuple[str, ...] | None]:
    """Return the checkpoint, its tensors fitted to its own number of classes, and the names."""
    loaded = checkpoint.read_all(paths, origin)
    if more:
        loaded = replace(loaded, tensors=loaded.tensors | dict(more))
    names = class_names(loaded, row, classes)
    if classes is not None and names != tuple(classes):
        count = names if isinstance(names, int) else len(names)
        raise CheckpointError(
            f"{shown(origin, 300)} has {count} classes and {len(classes)} names were given; "
            "give one name for each class"
        )
    with torch.device("meta"):
        model = build(row, placeholders(names) if isinstance(names, int) else names)
    fitted = fit(loaded, row, model, origin, allow_nonfinite=allow_nonfinite)
    return loaded, fitted, None if isinstance(names, int) else names


def placeholders(count: int) -> tuple[str, ...]:
    """Make names for classes whose names are unknown."""
    return tuple(f"class {index}" for index in range(count))


def _converted(loaded: Checkpoint, fitted: Fitted) -> Converted:
    return Converted(
        container=loaded.container,
        cast=fitted.cast,
        filled=fitted.filled,
        removed=fitted.removed,
        metadata=loaded.metadata,
        classes=fitted.tensors[CLASS_BIAS].shape[0] - 1,
    )


def _cast(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None, allow_nonfinite: bool
) -> dict[str, Tensor]:
    cast = {
        name: value.to(dtype) if dtype and value.is_floating_point() else value
        for name, value in tensors.items()
    }
    if dtype and not allow_nonfinite:
        fitting.check_finite(cast, "the converted file")
    return cast


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(value.nbytes for value in tensors.values())


def _what_it_is(tensors: Mapping[str, Tensor], asked: Row, categories: tuple[str, ...]) -> str:
    if any(name.endswith("neck.lateral_convs.0.bn.weight") for name in tensors):
        return (
            "\nThis looks like the older adapter-l file of release v0.1.2 (BatchNorm in neck and "
            "heads, 50.9 / 44.8 AP), which the published link has replaced: use v0.3.1"
        )
    found = []
    for row in PUBLISHED:
        if row.name == asked.name:
            continue
        with torch.device("meta"):
            candidate = build(row, categories)
        try:
            fitting.fit(tensors, candidate.state_dict(), row.name, allow_nonfinite=True)
        except CheckpointError:
            continue
        found.append(row.name)
    return f"\nThe file fits {' or '.join(found)}: load it under that name" if found else ""
