"""Look a torch file over before it is read: what it declares may not exceed what it holds."""

import pickletools
import re
import zipfile
from pathlib import Path
from typing import IO

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from vitadapter_zoo.errors import CheckpointError, UnsafeCheckpointError

# What torch.save writes into its zip, and nothing else.
MEMBER = re.compile(
    r"[^/]*/(?:data\.pkl|data/\d+|version|byteorder|\.data/serialization_id|"
    r"\.format_version|\.storage_alignment)"
)

# weights_only lets these be called with any number, which takes that many bytes.
TAKES_MEMORY = ("builtins bytearray", "__builtin__ bytearray")
LEGACY_PICKLES = 5  # magic number, protocol, system, content, keys of the storages


def check_zip(path: Path, origin: str) -> None:
    """Refuse a zip that torch.save did not write: compressed, or with members of other kinds.

    Its members' checksums are compared too: for most published files they are the only ones.

    Raises:
        UnsafeCheckpointError: a zip bomb, a second pickle, or anything else that is not weights.
        CheckpointError: not a whole zip, or one with changed bytes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_members(members, path, origin)
            for member in members:
                # torch writes zeros where it was told to compute none.
                if member.CRC:
                    _read_through(archive, member)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(
            f"{origin} is a damaged or truncated torch file ({error}); download it again"
        ) from error


def _read_through(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Read a member to its end, where zipfile compares its checksum."""
    with archive.open(member) as content:
        while content.read(1 << 20):
            pass


def _check_members(members: list[zipfile.ZipInfo], path: Path, origin: str) -> None:
    names = [member.filename for member in members]
    strange = [name for name in names if not MEMBER.fullmatch(name)]
    packed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
    if strange or packed or len(set(names)) != len(names):
        what = (
            f"holds {strange[0]!r}, which is no part of a checkpoint"
            if strange
            else f"holds {packed[0]!r} in compressed form, as zip bombs do and torch does not"
            if packed
            else "holds two members of one name"
        )
        raise UnsafeCheckpointError(
            f"{origin} was refused: it {what}. Nothing in it was run. Get the file from its "
            "publisher again"
        )
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise UnsafeCheckpointError(
            f"{origin} was refused: its members claim to be larger than the file itself"
        )


def check_calls(path: Path, origin: str, *, zipped: bool) -> None:
    """Refuse a pickle that names what takes memory by the number, which weights never need.

    Raises:
        UnsafeCheckpointError: it names such a thing.
        ValueError: it is no pickle.
    """
    if zipped:
        with zipfile.ZipFile(path) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            with archive.open(name) as content:
                named = _globals(content)
    else:
        with path.open("rb") as content:
            named = set()
            for _ in range(LEGACY_PICKLES):
                if content.peek(1):  # whether there are fewer, the reader will judge
                    named |= _globals(content)
    found = named.intersection(TAKES_MEMORY)
    if found:
        raise UnsafeCheckpointError(
            f"{origin} was refused: it names {found.pop().replace(' ', '.')!r}, which is no part "
            "of a checkpoint. Nothing in it was run. Get the file from its publisher again"
        )


def _globals(content: IO[bytes]) -> set[str]:
    """Everything that one pickle names, as ``module name``."""
    steps = pickletools.genops(content)
    return {str(argument) for code, argument, _ in steps if code.name == "GLOBAL"}


def check_declared(path: Path, origin: str) -> None:
    """Refuse a pickle whose tensors claim more bytes than the file has, before memory is taken.

    The pickle is read with tensors that have shapes and no memory.

    Raises:
        UnsafeCheckpointError: it declares more than it holds.
    """
    with FakeTensorMode():
        content = torch.load(path, map_location="cpu", weights_only=True)
    tensors = [leaf for leaf in tree_leaves(content) if isinstance(leaf, torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    declared = sum({storage._cdata: storage.nbytes() for storage in storages}.values())
    largest = max((tensor.nbytes for tensor in tensors), default=0)
    held = path.stat().st_size
    if max(declared, largest) > held:
        raise UnsafeCheckpointError(
            f"{origin} was refused: its tensors claim {max(declared, largest):,} "
            f"bytes and the whole file has {held:,}. Get the file from its publisher again"
        )
