"""Torch files, zip and legacy: the positions of their storages, and the tensors in them.

The file is mapped into memory; a tensor is a view of the bytes that its storage has in the file.
Nothing is computed from what the pickle claims before it was compared with the file's size.
"""

import mmap
import re
import struct
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitadapter_zoo.errors import CheckpointError, UnsafeCheckpointError
from vitadapter_zoo.text import quoted, shown
from vitadapter_zoo.weights import pickle_reader
from vitadapter_zoo.weights.pickle_reader import Pickled
from vitadapter_zoo.weights.pickle_values import (
    DamagedError,
    Pairs,
    RefusedError,
    StorageRecord,
    TensorRecord,
)
from vitadapter_zoo.weights.refusal import refusal

# What torch.save writes into its zip, and nothing else.
MEMBER = re.compile(
    r"[^/]*/(?:data\.pkl|data/\d+|version|byteorder|\.data/serialization_id|"
    r"\.format_version|\.storage_alignment)"
)
LARGEST_DIRECTORY = 16 << 20  # bytes; about 200,000 storages
MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a legacy file
DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}


@dataclass(frozen=True)
class TorchFile:
    """A torch file whose pickle was interpreted.

    Attributes:
        path: the file.
        value: what the pickle holds; tensors are ``TensorRecord``.
        places: first byte and number of bytes of each storage, by its key.
        swapped: whether the numbers have the other byte order.
        container: ``torch zip`` or ``legacy torch pickle``.
    """

    path: Path
    value: Any
    places: dict[str, tuple[int, int]]
    swapped: bool
    container: str


def read(path: Path, origin: str) -> TorchFile:
    """Interpret a torch file without making its tensors.

    Args:
        path: the file; its first bytes are a zip's or a pickle's.
        origin: what errors call it.

    Raises:
        UnsafeCheckpointError: it asks for anything but tensors and plain data, or for more of them
            than the file holds.
        CheckpointError: it is damaged or cut short.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            zipped = data[:4] == b"PK\x03\x04"
            with memoryview(data) as whole:
                return (_read_zip if zipped else _read_legacy)(path, whole, origin)
    except RefusedError as error:
        raise refusal(origin, error) from error
    # Each of these is a way in which a damaged file shows.
    except (DamagedError, zipfile.BadZipFile, OSError, ValueError, NotImplementedError,
            RuntimeError, struct.error) as error:  # fmt: skip
        raise CheckpointError(
            f"{origin} is a damaged or truncated torch file ({shown(error)}); download it again"
        ) from error


def _read_zip(path: Path, data: memoryview, origin: str) -> TorchFile:
    _check_directory(data)
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        _check_members(members, len(data))
        for member in members:
            if member.CRC:  # zero means that torch computed no checksum
                _read_through(archive, member)
    ranges = {member.filename.partition("/")[2]: _range(data, member) for member in members}
    if "data.pkl" not in ranges:
        raise DamagedError("it has no data.pkl")
    start, length = ranges["data.pkl"]
    order_start, order_length = ranges.get("byteorder", (0, 0))
    order = bytes(data[order_start : order_start + min(order_length, 16)])
    with data[start : start + length] as pickled:
        content = pickle_reader.read(pickled, 0, _is_tensor_attribute)
    places = {
        name.removeprefix("data/"): place
        for name, place in ranges.items()
        if name.startswith("data/")
    }
    _check_storages(content, places, len(data), origin)
    swapped = order not in (b"", sys.byteorder.encode())
    return TorchFile(path, content.value, places, swapped, "torch zip")


def _read_legacy(path: Path, data: memoryview, origin: str) -> TorchFile:
    end = 0
    for expected in (MAGIC, None, None):  # magic number, protocol, system
        header = pickle_reader.read(data, end, _is_tensor_attribute)
        if expected and header.value != expected:
            raise RefusedError("it is a pickle that torch.save did not write")
        end = header.end
    content = pickle_reader.read(data, end, _is_tensor_attribute)
    _check_claims(content, len(data), origin)
    keys = pickle_reader.read(data, content.end, _is_tensor_attribute)
    if type(keys.value) is not list or len(keys.value) != len(content.storages):
        raise DamagedError("its list of storages does not fit its tensors")
    places, end = {}, keys.end
    for key in keys.value:
        storage = content.storages.get(key) if type(key) is str else None
        if storage is None:
            raise DamagedError("its list of storages does not fit its tensors")
        (count,) = struct.unpack_from("<q", data, end)
        length = storage.count * _item_size(storage)
        if count != storage.count or end + 8 + length > len(data):
            raise DamagedError(f"the storage {quoted(key)} is cut short")
        places[key] = (end + 8, length)
        end += 8 + length
    little = header.value.get("little_endian") if type(header.value) is Pairs else None
    swapped = little is not None and little != (sys.byteorder == "little")
    return TorchFile(path, content.value, places, swapped, "legacy torch pickle")


def tensors(file: TorchFile, records: Mapping[str, TensorRecord], origin: str) -> dict[str, Tensor]:
    """Build the tensors of these records: read-only views of the mapped file.

    Args:
        file: the file.
        records: by the tensors' names.
        origin: what errors call the file.

    Raises:
        UnsafeCheckpointError: a tensor reaches beyond its storage, or claims to be larger than the
            whole file.
        CheckpointError: a tensor has a dtype without plain numbers.
    """
    size = file.path.stat().st_size
    mapped = torch.UntypedStorage.from_file(str(file.path), False, size)
    storages: dict[str, torch.UntypedStorage] = {}
    made = {}
    for name, record in records.items():
        dtype = _dtype(record)
        if dtype is None:
            kind = record.dtype or record.storage.kind
            raise CheckpointError(
                f"{origin}: the tensor {quoted(name)} is of the type {quoted(kind, 30)}, which "
                "has no plain numbers (quantised?); convert it to float32 first"
            )
        key = record.storage.key
        start, length = file.places[key]
        _check_tensor(name, record, dtype, length, size, origin)
        if key not in storages:
            storage = mapped[start : start + length] if length else torch.UntypedStorage(0)
            if start % dtype.itemsize or file.swapped:
                storage = storage.clone()
            if file.swapped:
                storage.byteswap(dtype)
            storages[key] = storage
        made[name] = torch.empty(0, dtype=dtype).set_(
            storages[key], record.storage.start + record.offset, record.size, record.stride
        )
    return made


def _check_tensor(
    name: str, record: TensorRecord, dtype: torch.dtype, length: int, held: int, origin: str
) -> None:
    """Refuse a tensor that reaches beyond its storage or pretends to be larger than the file."""
    elements = last = 1
    for size, stride in zip(record.size, record.stride, strict=True):
        elements *= size
        last += (size - 1) * stride
    if not elements:
        return
    if elements * dtype.itemsize > held:
        raise _overclaimed(origin, elements * dtype.itemsize, held)
    if (record.storage.start + record.offset + last) * dtype.itemsize > length:
        raise UnsafeCheckpointError(
            f"{origin} was refused: the tensor {quoted(name)} reaches beyond its storage. Nothing "
            "in it was run. Get the file from its publisher again"
        )


def _dtype(record: TensorRecord) -> torch.dtype | None:
    found = getattr(torch, record.dtype, None) if record.dtype else DTYPES.get(record.storage.kind)
    return found if isinstance(found, torch.dtype) else None


def _is_tensor_attribute(name: str) -> bool:
    return hasattr(torch.nn.Parameter, name)


def _item_size(storage: StorageRecord) -> int:
    dtype = DTYPES.get(storage.kind)
    if dtype is None:
        raise RefusedError(f"it holds a storage of the type {quoted(storage.kind, 30)}")
    return dtype.itemsize


def _check_claims(content: Pickled, held: int, origin: str) -> None:
    """Refuse storages that claim more bytes than the file has; shared ones count once."""
    claimed = sum(
        storage.count * _item_size(storage)
        for storage in content.storages.values()
        if storage.kind in DTYPES
    )
    if claimed > held:
        raise _overclaimed(origin, claimed, held)


def _overclaimed(origin: str, claimed: int, held: int) -> UnsafeCheckpointError:
    return UnsafeCheckpointError(
        f"{origin} was refused: its tensors claim {claimed:,} bytes and the whole file has "
        f"{held:,}. Get the file from its publisher again"
    )


def _check_storages(
    content: Pickled, places: dict[str, tuple[int, int]], held: int, origin: str
) -> None:
    _check_claims(content, held, origin)
    for key, storage in content.storages.items():
        if key not in places:
            raise DamagedError(f"the storage {quoted(key)} is missing")
        if storage.kind in DTYPES and storage.count * _item_size(storage) > places[key][1]:
            raise DamagedError(f"the storage {quoted(key)} is cut short")


def _check_directory(data: memoryview) -> None:
    """Refuse a zip whose directory would fill the memory before any member is looked at."""
    tail = bytes(data[-(22 + 65535) :])
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + 22:
        raise zipfile.BadZipFile("File is not a zip file")
    (size,) = struct.unpack_from("<I", tail, at + 12)
    locator = len(data) - len(tail) + at - 20
    if size == 0xFFFFFFFF and locator >= 0 and bytes(data[locator : locator + 4]) == b"PK\x06\x07":
        (place,) = struct.unpack_from("<Q", data, locator + 8)
        if place + 56 > len(data):
            raise zipfile.BadZipFile("its directory lies outside")
        (size,) = struct.unpack_from("<Q", data, place + 40)
    if size > LARGEST_DIRECTORY:
        raise RefusedError(f"it has a zip directory of {size:,} bytes")


def _read_through(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Read a member to its end, where zipfile compares its checksum."""
    with archive.open(member) as content:
        while content.read(1 << 20):
            pass


def _check_members(members: list[zipfile.ZipInfo], held: int) -> None:
    names = [member.filename for member in members]
    strange = [name for name in names if not MEMBER.fullmatch(name)]
    packed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
    if strange:
        raise RefusedError(f"it holds {quoted(strange[0])}, which is not part of a checkpoint")
    if packed:
        raise RefusedError(
            f"it holds {quoted(packed[0])} in compressed form, as zip bombs do and torch does not"
        )
    if len({name.partition("/")[2] for name in names}) != len(names):
        raise RefusedError("it holds two members of one name")
    if any(member.flag_bits & 1 for member in members):
        raise RefusedError("its members are encrypted")
    if sum(member.file_size for member in members) > held:
        raise RefusedError("its members claim to be larger than the file itself")


def _range(data: memoryview, member: zipfile.ZipInfo) -> tuple[int, int]:
    """Return first byte and size of a member, from its own header in the file."""
    at = member.header_offset
    signature, name_length, extra_length = struct.unpack_from("<4s22x2H", data, at)
    start = at + 30 + name_length + extra_length
    if signature != b"PK\x03\x04" or start + member.file_size > len(data):
        raise DamagedError(f"the member {quoted(member.filename)} lies outside of the file")
    return start, member.file_size
