"""Read a published checkpoint safely, and fit its tensors to a network.

Pickles are read with ``weights_only=True``, which builds tensors and plain data and nothing else.
"""

import json
import pickle
import re
import threading
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from vitadapter_zoo.errors import CheckpointError, UnsafeCheckpointError
from vitadapter_zoo.weights.torch_file import check_calls, check_declared, check_zip

NUMBERS = ("f2", "f4", "f8", "i4", "i8", "u1", "b1")  # numpy's names of plain numbers


def _number(name: str, *rest: object) -> "np.dtype[Any]":
    """numpy.dtype as pickles call it, for plain numbers alone: others may be of any size."""
    if name not in NUMBERS:
        raise pickle.UnpicklingError(f"GLOBAL numpy.dtype of {name!r}")
    return np.dtype(name)


# mmcv's hook_msgs may hold a numpy score. numpy 1.x wrote another module's name, hence the pair.
_SCALAR = np.float64(0).__reduce__()[0]
NUMPY_SCALARS: list[Any] = [
    _SCALAR,
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_number, "numpy.dtype"),
    *(type(np.dtype(name)) for name in NUMBERS),
]

# Absent parameters that may be filled, because the result is provably the same: layer scales of a
# row that was trained without them are ones. Never Uni-Perceiver's gamma_1/gamma_2: those start at
# zero, and filling them would silence the blocks.
LAYER_SCALES_OFF = {"adapter-t-deit-1x": re.compile(r"backbone\.blocks\.\d+\.gamma[12]")}
BATCH_COUNTERS = re.compile(r".*\.num_batches_tracked")  # take no part in evaluation
# torch's list of safe globals, and Python's of warnings, belong to the process, not to a thread.
ONE_AT_A_TIME = threading.Lock()
LARGEST_HEADER = 100_000_000  # bytes; the safetensors format's own limit
# The Hub's names for safetensors weights, in one file or in several with an index.
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LARGEST_INDEX = 64 << 20  # bytes
LISTED = 8  # names shown per kind of mismatch


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file, under their state-dict names, and what the file was."""

    tensors: dict[str, Tensor]
    container: str
    metadata: dict[str, str | int | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Fitted:
    """Tensors that fit a network exactly, and what was done to make them fit."""

    tensors: dict[str, Tensor]
    cast: dict[str, int]
    filled: list[str]


def is_safetensors(path: Path) -> bool:
    """Whether the content is a safetensors file, whatever its name.

    Raises:
        CheckpointError: the file cannot be read.
    """
    return _is_safetensors(_head(path, str(path)))


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < LARGEST_HEADER


def read(path: Path, origin: str) -> Checkpoint:
    """Read a torch zip, a legacy torch pickle or a safetensors file; the content decides which.

    Zip and safetensors files are memory-mapped: pages are read when they are used.

    Args:
        path: the file.
        origin: what errors call it: the path, or the URL that it came from.

    Raises:
        CheckpointError: missing, truncated, or not a checkpoint.
        UnsafeCheckpointError: a pickle that asks for anything but tensors and plain data.
    """
    head = _head(path, origin)
    if _is_safetensors(head):
        try:
            tensors = safetensors.torch.load_file(path)
            return Checkpoint(tensors, "safetensors", _training(path))
        except safetensors.SafetensorError as error:
            raise CheckpointError(
                f"{origin} is a damaged or truncated safetensors file ({error}); download it again"
            ) from error
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(
            f"{origin} is a web page (HTML), not weights: a login or error page saved under the "
            "file's name; open the address in a browser and download the file itself"
        )
    zipped = head.startswith(b"PK\x03\x04")
    if not zipped and not head.startswith(b"\x80"):
        raise CheckpointError(
            f"{origin} is not a checkpoint: neither a torch file (.pth, .pth.tar) nor safetensors"
        )
    loaded = _load_pickle(path, origin, mapped=zipped)
    container = "torch zip" if zipped else "legacy torch pickle"
    return Checkpoint(_state_dict(loaded, origin), container, _plain_metadata(loaded))


def shard_names(index: Path) -> list[str]:
    """The files that an index of sharded safetensors names, all in the index's own folder.

    Raises:
        CheckpointError: not an index, or one that names files elsewhere.
    """
    try:
        if index.stat().st_size > LARGEST_INDEX:
            raise ValueError(f"larger than {LARGEST_INDEX >> 20} MB")
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if not names or any(Path(name).name != name or name in ("", "..") for name in names):
            raise ValueError("it names files outside its own folder, or none")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of sharded safetensors: {error}") from error
    return names


def read_all(paths: list[Path], origin: str) -> Checkpoint:
    """Read one file as ``read`` does, or the shards of one checkpoint.

    Raises:
        CheckpointError: as ``read``, or a tensor stands in two shards.
        UnsafeCheckpointError: as ``read``.
    """
    if len(paths) == 1:
        return read(paths[0], origin)
    tensors: dict[str, Tensor] = {}
    for path in paths:
        shard = read(path, f"{origin} ({path.name})").tensors
        twice = tensors.keys() & shard.keys()
        if twice:
            raise CheckpointError(f"{origin}: {min(twice)} stands in more than one shard")
        tensors |= shard
    return Checkpoint(tensors, "safetensors")


def _head(path: Path, origin: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {origin}: {error.strerror}") from error


def _load_pickle(path: Path, origin: str, *, mapped: bool) -> object:
    try:
        if mapped:
            check_zip(path, origin)
        with (
            ONE_AT_A_TIME,
            torch.serialization.safe_globals(NUMPY_SCALARS),
            warnings.catch_warnings(),
        ):
            # torch remarks on unusual pickle protocols, right before it refuses or reads them.
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            check_calls(path, origin, zipped=mapped)
            check_declared(path, origin)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        detail = f"it names {wanted[1]!r}" if wanted else "its instructions are not those of one"
        raise UnsafeCheckpointError(
            f"{origin} was refused: a checkpoint is a pickle of tensors and plain data, and this "
            f"is not ({detail}). Nothing in it was run. Get the file from its publisher again"
        ) from error
    # A damaged file can make the reader fail in any way; each of them means the same.
    except Exception as error:
        detail = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{origin} is a damaged or truncated torch file ({detail}); download it again"
        ) from error


def _state_dict(loaded: object, origin: str) -> dict[str, Tensor]:
    state = loaded
    if isinstance(loaded, Mapping):  # DeiT and timm say "model"
        state = loaded.get("state_dict", loaded.get("model", loaded))
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{origin} holds no state_dict: it is not a checkpoint of a network")
    strange = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(
            f"{origin} is not a checkpoint of a network: {strange[0]!r} is no tensor"
        )
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def _training(path: Path) -> dict[str, str | int | float]:
    """The training framework's metadata, where ``convert`` wrote the file."""
    with safetensors.safe_open(path, "pt") as file:
        written = (file.metadata() or {}).get("training", "{}")
    try:
        return _plain_metadata({"meta": json.loads(written)})
    except ValueError:  # somebody else's use of the word
        return {}


def _plain_metadata(loaded: object) -> dict[str, str | int | float]:
    meta = loaded.get("meta") if isinstance(loaded, Mapping) else None
    if not isinstance(meta, Mapping):
        return {}
    kept = ("mmdet_version", "mmcv_version", "exp_name", "epoch", "iter", "seed", "time")
    return {key: meta[key] for key in kept if isinstance(meta.get(key), (str, int, float))}


def fit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], model: str) -> Fitted:
    """Bring tensors to the names, shapes and dtypes of a network, strictly.

    Floating-point tensors become float32 and BatchNorm counters int64. Only two kinds of absent
    parameters are filled, and reported: BatchNorm counters (zero), and the layer scales of
    ``adapter-t-deit-1x`` (ones), which was trained without them.

    Args:
        tensors: from the file.
        expected: the network's state dict; the meta device is enough.
        model: load name of the row.

    Raises:
        CheckpointError: missing, unexpected or mis-shaped parameters, all in one message.
    """
    filled = {
        name: torch.zeros((), dtype=torch.int64)
        for name in expected
        if name not in tensors and BATCH_COUNTERS.fullmatch(name)
    }
    scales = LAYER_SCALES_OFF.get(model)
    if scales and not any(scales.fullmatch(name) for name in tensors):
        filled |= {
            name: torch.ones(value.shape)
            for name, value in expected.items()
            if scales.fullmatch(name)
        }
    missing = [name for name in expected if name not in tensors and name not in filled]
    unexpected = [name for name in tensors if name not in expected]
    misshaped = [
        f"{name} (file {list(tensors[name].shape)}, model {list(expected[name].shape)})"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    mistyped = [
        f"{name} (file {tensors[name].dtype}, model {expected[name].dtype})"
        for name in expected
        if name in tensors
        and tensors[name].is_floating_point() != expected[name].is_floating_point()
    ]
    problems = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": misshaped,
        "of another kind": mistyped,
    }
    if any(problems.values()):
        raise CheckpointError(
            f"the weights do not fit {model}:"
            + "".join(_listed(kind, names) for kind, names in problems.items() if names)
        )
    cast: Counter[str] = Counter()
    fitted = {}
    for name, wanted in expected.items():
        value = filled[name] if name in filled else tensors[name]
        if value.dtype != wanted.dtype:
            cast[str(value.dtype).removeprefix("torch.")] += 1
        fitted[name] = value.to(wanted.dtype).contiguous()
    return Fitted(fitted, dict(cast), list(filled))


def _listed(kind: str, names: list[str]) -> str:
    more = f"\n    ... and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"\n  {len(names)} {kind}:" + "".join(f"\n    {name}" for name in names[:LISTED]) + more
