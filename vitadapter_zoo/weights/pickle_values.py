"""The values that a torch file's pickle may describe, and the functions that it may name."""

from dataclasses import dataclass
from typing import Any, Final


class RefusedError(Exception):
    """The pickle needs something that is not allowed in a checkpoint.

    Attributes:
        name: the function or class that it names, ``module.name``; empty if there is none.
        first: whether that name begins the pickle, as it does if a whole object was saved.
    """

    def __init__(self, reason: str, name: str = "", *, first: bool = False) -> None:
        super().__init__(reason)
        self.name = name
        self.first = first


class DamagedError(Exception):
    """The pickle ends early, or its instructions contradict each other."""


class _Opaque:
    """A value that does not belong to the weights and was not built."""

    def __repr__(self) -> str:
        return "OPAQUE"


OPAQUE: Final = _Opaque()


class Pairs(list[tuple[Any, Any]]):
    """A dictionary as its (key, value) pairs, in the order of the file."""

    def get(self, key: str, default: Any = None) -> Any:
        """Return the last value of a text key."""
        for found, value in reversed(self):
            if type(found) is str and found == key:
                return value
        return default


@dataclass(frozen=True, slots=True)
class Named:
    """A function or class that checkpoints may name; it is never looked up."""

    module: str
    name: str

    @property
    def path(self) -> str:
        """``module.name``."""
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True)
class StorageRecord:
    """A block of numbers in the file.

    Attributes:
        kind: the class of the storage, ``FloatStorage`` for instance.
        key: the block's name in the file.
        count: number of elements; of bytes for ``UntypedStorage``.
        start: first element of a view into the block, in legacy files.
    """

    kind: str
    key: str
    count: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """The file's description of a tensor.

    Attributes:
        storage: the block that holds its elements.
        offset: its first element in the block.
        size: its shape.
        stride: elements from one index to the next, per dimension.
        dtype: name of the dtype if the tensor states it; else the storage's.
    """

    storage: StorageRecord
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A tensor without plain numbers, such as a quantised or sparse one."""

    kind: str


UNSUPPORTED = {
    "_rebuild_qtensor": "quantised",
    "_rebuild_sparse_tensor": "sparse",
    "_rebuild_sparse_csr_tensor": "sparse",
    "_rebuild_nested_tensor": "nested",
    "_rebuild_meta_tensor_no_storage": "without values (meta device)",
    "_rebuild_wrapper_subclass": "of a subclass without values",
    "_rebuild_device_tensor_from_numpy": "of a device that stores numpy arrays",
    "_rebuild_device_tensor_from_cpu_tensor": "of a device that is not supported",
}
REBUILD = {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"}
WRAP = {"_rebuild_parameter", "_rebuild_parameter_with_state"}
NUMBERS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
# Called in checkpoints for values that are not weights. None of them is built.
_PLAIN = {
    "_codecs.encode",
    "builtins.bytearray",
    "builtins.bytes",
    "builtins.complex",
    "builtins.set",
    "builtins.frozenset",
    "builtins.slice",
    "builtins.range",
    "collections.Counter",
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
}
OLD_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # Python 2's


def is_allowed(module: str, name: str) -> bool:
    """Return whether checkpoints may name that function, class or constant."""
    path = f"{module}.{name}"
    if module == "torch._utils":
        return name in UNSUPPORTED or name in REBUILD or name in WRAP
    if module == "torch" or module.startswith(("torch.cuda", "torch.sparse")):
        known = {"Tensor", "Size", "device", "strided", "sparse_coo", "contiguous_format",
                 "preserve_format", "channels_last", "channels_last_3d"}  # fmt: skip
        return (
            name.endswith(("Storage", "Tensor"))
            or name in known
            or name.startswith(("per_tensor_", "per_channel_"))
            or is_dtype(name)
        )
    if module in ("numpy.dtypes", "numpy") and (name.endswith("DType") or name == "dtype"):
        return True
    return path in _PLAIN or path in (
        "collections.OrderedDict",
        "collections.defaultdict",
        "builtins.dict",
        "builtins.list",
        "builtins.int",
        "builtins.float",
        "torch._tensor._rebuild_from_type_v2",
        "torch.nn.parameter.Parameter",
        "torch.nn.parameter.Buffer",
        "torch.storage.UntypedStorage",
        "torch.storage.TypedStorage",
        "torch.storage._TypedStorage",
        "torch.storage._UntypedStorage",
    )


def is_dtype(name: str) -> bool:
    """Whether torch has a dtype of that name, or might in another version."""
    stems = ("float", "bfloat", "int", "uint", "complex", "qint", "quint", "bits", "half", "double",
             "bool", "short", "long")  # fmt: skip
    return name.startswith(stems) and name.replace("_", "").isalnum()


def text_of(value: Any) -> Any:
    """Return text; Python 2 wrote it as bytes."""
    return value.decode("ascii") if type(value) is bytes else value


def is_count(value: Any) -> bool:
    """Whether a value is a number of elements."""
    return type(value) is int and 0 <= value < 1 << 62


def _counts(value: Any, what: str) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > 64 or not all(is_count(x) for x in value):
        raise RefusedError(f"it describes a tensor whose {what} is not a few whole numbers")
    return value


def tensor(name: str, arguments: tuple[Any, ...]) -> TensorRecord | Unsupported:
    """Return the tensor that a call of ``torch._utils._rebuild_tensor*`` describes.

    Raises:
        RefusedError: the arguments do not describe a tensor.
    """
    storage, offset, size, stride = arguments[:4]
    if not isinstance(storage, StorageRecord) or not is_count(offset):
        raise RefusedError("it describes a tensor without a storage")
    size, stride = _counts(size, "shape"), _counts(stride, "stride")
    if len(size) != len(stride):
        raise RefusedError("it describes a tensor with more strides than dimensions")
    dtype = None
    bits = arguments[6] if len(arguments) > 6 else None
    if name == "_rebuild_tensor_v3":
        if not isinstance(bits, Named):
            raise RefusedError("it describes a tensor without a dtype")
        dtype, bits = bits.name, arguments[7] if len(arguments) > 7 else None
    if bits:  # negated or conjugated, whose numbers differ from those in the file
        return Unsupported("a lazily negated or conjugated view")
    return TensorRecord(storage, offset, size, stride, dtype)
