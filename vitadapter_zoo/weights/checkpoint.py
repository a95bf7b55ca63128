"""Read a checkpoint safely: its tensors, its class names and its training metadata."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from vitadapter_zoo.errors import CheckpointError
from vitadapter_zoo.text import JSONError, parse_json, quoted, shown
from vitadapter_zoo.weights import torch_file
from vitadapter_zoo.weights.pickle_values import Pairs, TensorRecord, Unsupported
from vitadapter_zoo.weights.shards import LONGEST_NAME, MOST_CLASSES

LARGEST_HEADER = 100_000_000  # bytes; the safetensors format's own limit
# Where training frameworks put the weights, in the order of preference.
STATE_KEYS = ("state_dict", "model_state_dict", "model", "state_dict_ema", "ema_state_dict",
              "model_ema", "ema", "network", "net", "weights", "module", "model_state", "params",
              "params_ema")  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file, under the file's own names, and the file's kind.

    Attributes:
        tensors: by name.
        container: torch zip, legacy torch pickle or safetensors.
        metadata: the training framework's plain metadata (versions, epoch).
        classes: names of the classes in the order of the outputs, if the file has them.
    """

    tensors: dict[str, Tensor]
    container: str
    metadata: dict[str, str | int | float] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None


def is_safetensors(path: Path) -> bool:
    """Return whether the content is a safetensors file, whatever its name.

    Raises:
        CheckpointError: the file cannot be read.
    """
    return _is_safetensors(_head(path, str(path)))


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < LARGEST_HEADER


def read(path: Path, origin: str) -> Checkpoint:
    """Read a torch zip, a legacy torch pickle or a safetensors file; the content decides which.

    All of them are memory-mapped: pages are read when they are used. Nothing that a pickle asks
    for is called, see ``pickle_reader``.

    Args:
        path: the file.
        origin: what errors call it: the path, or the URL that it came from.

    Raises:
        CheckpointError: missing, truncated, or not a checkpoint.
        UnsafeCheckpointError: a pickle that asks for anything but tensors and plain data.
    """
    origin = shown(origin, 300)
    head = _head(path, origin)
    if _is_safetensors(head):
        return _read_safetensors(path, origin)
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(
            f"{origin} is a web page (HTML), not weights: a login or error page saved under the "
            "file's name; open the address in a browser and download the file itself"
        )
    if not head.startswith((b"PK\x03\x04", b"\x80")):
        raise CheckpointError(
            f"{origin} is not a checkpoint: neither a torch file (.pth, .pth.tar) nor safetensors"
        )
    file = torch_file.read(path, origin)
    records = _state_dict(file.value, origin)
    tensors = torch_file.tensors(file, records, origin)
    return Checkpoint(tensors, file.container, _plain_metadata(file.value), _classes(file.value))


def _read_safetensors(path: Path, origin: str) -> Checkpoint:
    try:
        tensors = safetensors.torch.load_file(path)
        with safetensors.safe_open(path, "pt") as file:
            written = file.metadata() or {}
    # safetensors raises KeyError and others for dtypes that torch does not have.
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise CheckpointError(
            f"{origin} is a damaged or truncated safetensors file ({shown(error)}); download it "
            "again"
        ) from error
    meta = {key: _foreign_json(written.get(key, "null")) for key in ("training", "classes")}
    pairs = Pairs([("meta", _pairs(meta["training"]))])
    return Checkpoint(tensors, "safetensors", _plain_metadata(pairs), _names(meta["classes"]))


def _foreign_json(text: str) -> Any:
    try:
        return parse_json(text)
    except JSONError:  # other tools use the same words for something else
        return None


def read_all(paths: list[Path], origin: str) -> Checkpoint:
    """Read one file as ``read`` does, or the shards of one checkpoint.

    Raises:
        CheckpointError: as ``read``, or a tensor is in two shards.
        UnsafeCheckpointError: as ``read``.
    """
    if len(paths) == 1:
        return read(paths[0], origin)
    tensors: dict[str, Tensor] = {}
    classes: tuple[str, ...] | None = None
    for path in paths:
        part = read(path, f"{origin} ({shown(path.name)})")
        classes, shard = classes or part.classes, part.tensors
        twice = tensors.keys() & shard.keys()
        if twice:
            raise CheckpointError(
                f"{shown(origin, 300)}: the tensor {quoted(min(twice))} is in more than one shard"
            )
        tensors |= shard
    return Checkpoint(tensors, "safetensors", classes=classes)


def _head(path: Path, origin: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {origin}: {error.strerror}") from error


def _state_dict(loaded: object, origin: str) -> dict[str, TensorRecord]:
    """Find the tensors' descriptions by name, wherever the training framework put them."""
    state = loaded
    for _ in range(3):  # {"model": {"state_dict": ...}}
        inner = [state.get(key) for key in STATE_KEYS] if isinstance(state, Pairs) else []
        state = next((value for value in inner if isinstance(value, Pairs) and value), state)
    if not isinstance(state, Pairs) or not state:
        raise CheckpointError(f"{origin} holds no state_dict: it is not a checkpoint of a network")
    records: dict[str, TensorRecord] = {}
    for key, value in state:
        name = key.decode("utf-8", "replace") if type(key) is bytes else key
        if isinstance(value, Unsupported):
            raise CheckpointError(
                f"{origin}: the tensor {quoted(name)} is {value.kind}; save it as a plain tensor "
                "of numbers first"
            )
        if type(name) is not str or not isinstance(value, TensorRecord):
            label = quoted(name) if type(name) is str else f"an entry ({type(key).__name__})"
            raise CheckpointError(
                f"{origin} is not a checkpoint of a network: {label} is not a tensor"
            )
        if name in records:
            raise CheckpointError(f"{origin} holds two values for one name: {quoted(name)}")
        records[name] = value
    return records


def _pairs(value: object) -> object:
    return Pairs(value.items()) if isinstance(value, dict) else value


def _plain_metadata(loaded: object) -> dict[str, str | int | float]:
    meta = loaded.get("meta") if isinstance(loaded, Pairs) else None
    if not isinstance(meta, Pairs):
        return {}
    kept = ("mmdet_version", "mmcv_version", "exp_name", "epoch", "iter", "seed", "time")
    found = {key: meta.get(key) for key in kept}
    return {
        key: value[:200] if isinstance(value, str) else value
        for key, value in found.items()
        if isinstance(value, (str, float)) or (isinstance(value, int) and abs(value) < 1 << 63)
    }


def _classes(loaded: object) -> tuple[str, ...] | None:
    """The class names that mmdet writes (``CLASSES``; ``dataset_meta`` since version 3)."""
    meta = loaded.get("meta") if isinstance(loaded, Pairs) else None
    if not isinstance(meta, Pairs):
        return None
    newer = meta.get("dataset_meta")
    found = newer.get("classes") if isinstance(newer, Pairs) else None
    return _names(meta.get("CLASSES") or found)


def _names(value: object) -> tuple[str, ...] | None:
    if not isinstance(value, (list, tuple)) or not 0 < len(value) <= MOST_CLASSES:
        return None
    names: tuple[object, ...] = tuple(value)
    texts = {name for name in names if isinstance(name, str) and name and len(name) <= LONGEST_NAME}
    return tuple(map(str, names)) if len(texts) == len(names) else None
