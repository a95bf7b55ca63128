"""From any published container to safetensors, and back to the original code's ``.pth``."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from vitadapter_zoo.catalog import COCO_CLASSES, ROWS, Row
from vitadapter_zoo.errors import CheckpointError, ZooError
from vitadapter_zoo.models import MaskRCNN, build
from vitadapter_zoo.weights import atomic, checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Converted:
    """What a source file was, and what was done to its tensors."""

    container: str
    cast: dict[str, int]
    filled: list[str]
    metadata: dict[str, str | int | float]


def to_safetensors(
    paths: list[Path],
    origin: str,
    row: Row,
    target: Path,
    *,
    sha256: str,
    dtype: torch.dtype | None = None,
) -> Converted:
    """Write the weights of one row as safetensors.

    Zip and safetensors sources are memory-mapped, so the weights are in memory once at most; a
    legacy pickle is read into memory and written from there.

    Args:
        paths: the source file, or the shards that it consists of.
        origin: what errors and metadata call it.
        row: the row that the weights must fit, strictly.
        target: file to write; it is replaced in one step.
        sha256: hash of the source, for the metadata; of shards, as ``atomic.sha256_of_all`` has it.
        dtype: floating-point type to store; float32 by default.

    Raises:
        CheckpointError: damaged, unsafe, or not the row's weights.
        ZooError: the target cannot be written.
    """
    loaded, fitted = _fitted(paths, origin, row)
    metadata = {
        "format": "pt",
        "model": row.name,
        "source": origin,
        "source_sha256": sha256,
        "license": row.license,
        "training": json.dumps(loaded.metadata),
    }
    write_safetensors(_cast(fitted.tensors, dtype), target, metadata)
    return Converted(loaded.container, fitted.cast, fitted.filled, loaded.metadata)


def to_mmdet(
    paths: list[Path],
    origin: str,
    row: Row,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
) -> Converted:
    """Write the weights of one row as mmdet's ``.pth``, which the original code loads strictly.

    Every parameter of the original network is there, in its order, under its name, with the class
    names and what is known of the training in ``meta``.

    Args:
        paths: the source file, or the shards that it consists of.
        origin: what errors call it.
        row: the row that the weights must fit, strictly.
        target: file to write; it is replaced in one step.
        dtype: floating-point type to store; float32 by default.

    Raises:
        CheckpointError: damaged, unsafe, or not the row's weights.
        ZooError: the target cannot be written.
    """
    loaded, fitted = _fitted(paths, origin, row)
    meta = {**loaded.metadata, "CLASSES": COCO_CLASSES}
    tensors = _cast(fitted.tensors, dtype)
    with atomic.replacing(target) as partial:
        atomic.check_space(target.parent, _size(tensors))
        try:
            torch.save({"meta": meta, "state_dict": tensors}, partial)
        except RuntimeError as error:  # torch's word for a full disk
            reason = str(error).partition("\n")[0]
            raise ZooError(f"cannot write {target}: {reason}; make room and try again") from error
    return Converted(loaded.container, fitted.cast, fitted.filled, loaded.metadata)


def write_safetensors(
    tensors: Mapping[str, Tensor], target: Path, metadata: dict[str, str]
) -> None:
    """Write one safetensors file in one step.

    Raises:
        ZooError: the target cannot be written.
    """
    with atomic.replacing(target) as partial:
        atomic.check_space(target.parent, _size(tensors))
        try:
            safetensors.torch.save_file(dict(tensors), partial, metadata)
        except safetensors.SafetensorError as error:  # its word for a full disk too
            raise ZooError(
                f"cannot write the converted weights to {target.parent}: {error}; make room there "
                "(`vitadapter-zoo cache prune`) and try again"
            ) from error


def fit(loaded: checkpoint.Checkpoint, row: Row, model: MaskRCNN, origin: str) -> checkpoint.Fitted:
    """``checkpoint.fit`` with the catalog's knowledge in its error: which row would fit.

    Raises:
        CheckpointError: the tensors are not the model's.
    """
    try:
        fitted = checkpoint.fit(loaded.tensors, model.state_dict(), row.name)
    except CheckpointError as error:
        hint = _what_it_is(loaded.tensors)
        raise CheckpointError(f"{origin}: {error}{hint}") from error
    if fitted.filled:
        logger.warning(
            "%s lacks %d parameters that change nothing (%s, ...): filled",
            origin,
            len(fitted.filled),
            fitted.filled[0],
        )
    return fitted


def _fitted(
    paths: list[Path], origin: str, row: Row
) -> tuple[checkpoint.Checkpoint, checkpoint.Fitted]:
    with torch.device("meta"):
        model = build(row)
    loaded = checkpoint.read_all(paths, origin)
    return loaded, fit(loaded, row, model, origin)


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {
        name: value.to(dtype) if dtype and value.is_floating_point() else value
        for name, value in tensors.items()
    }


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(value.nbytes for value in tensors.values())


def _what_it_is(tensors: Mapping[str, Tensor]) -> str:
    if any(name.startswith("neck.lateral_convs.0.bn.") for name in tensors):
        return (
            "\nThis looks like the older adapter-l file of release v0.1.2 (BatchNorm in neck and "
            "heads, 50.9 / 44.8 AP), which the published link has replaced: use v0.3.1"
        )
    fitting = []
    for row in ROWS:
        with torch.device("meta"):
            candidate = build(row)
        try:
            checkpoint.fit(tensors, candidate.state_dict(), row.name)
        except CheckpointError:
            continue
        fitting.append(row.name)
    return f"\nThe file fits {' or '.join(fitting)}: load it under that name" if fitting else ""
