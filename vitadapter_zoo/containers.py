"""Look a torch file over before it is read: what it declares may not exceed what it holds."""

import re
import zipfile
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from vitadapter_zoo.errors import CheckpointError, UnsafeCheckpointError

# What torch.save writes into its zip, and nothing else.
MEMBER = re.compile(
    r"[^/]*/(?:data\.pkl|data/\d+|version|byteorder|\.data/serialization_id|"
    r"\.format_version|\.storage_alignment)"
)


def check_zip(path: Path, origin: str) -> None:
    """Refuse a zip that torch.save did not write: compressed, or with members of other kinds.

    Raises:
        UnsafeCheckpointError: a zip bomb, a second pickle, or anything else that is not weights.
        CheckpointError: not a whole zip.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(
            f"{origin} is a damaged or truncated torch file ({error}); download it again"
        ) from error
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
