"""An interpreter for the pickles that ``torch.save`` writes. It calls nothing and imports nothing.

A pickle is a program. ``torch.load(weights_only=True)`` runs it with a short list of functions,
and some of those take any amount of memory or time. This interpreter knows the instructions, but
builds only lists of pairs for dictionaries, tuples, numbers, strings, and the description of each
tensor. A call of any other function that checkpoints hold (sets, byte strings, numpy scalars)
gives the marker ``OPAQUE``. A function or class that checkpoints never hold is refused by its
name.

Dictionaries are lists of pairs because keys from a hostile file can be chosen so that all of them
collide. Nothing here follows references, so a structure that contains itself a million times
costs no more than its instructions.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from vitadapter_zoo.text import quoted, shown

# Far above any checkpoint of these networks with its optimizer, which has about 150,000.
MOST_STEPS = 2_000_000
LARGEST_PICKLE = 32 << 20  # bytes


class RefusedError(Exception):
    """The pickle asks for something that checkpoints do not hold.

    Attributes:
        name: the function or class that it names, ``module.name``; empty where there is none.
        first: whether that name begins the pickle, as it does where a whole object was saved.
    """

    def __init__(self, reason: str, name: str = "", *, first: bool = False) -> None:
        super().__init__(reason)
        self.name = name
        self.first = first


class DamagedError(Exception):
    """The pickle ends early, or its instructions contradict each other."""


class _Opaque:
    """A value that takes no part in the weights and was not built."""

    def __repr__(self) -> str:
        return "OPAQUE"


OPAQUE: Final = _Opaque()


class Pairs(list[tuple[Any, Any]]):
    """A dictionary as its (key, value) pairs, in the order of the file."""

    def get(self, key: str, default: Any = None) -> Any:
        """The last value of a text key."""
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
    """What the file says of a tensor.

    Attributes:
        storage: the block that holds its elements.
        offset: its first element in the block.
        size: its shape.
        stride: elements from one index to the next, per dimension.
        dtype: name of the dtype where the tensor states it; else the storage's.
    """

    storage: StorageRecord
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A tensor of a kind that has no plain numbers: ``quantised``, ``sparse`` and so on."""

    kind: str


_UNSUPPORTED = {
    "_rebuild_qtensor": "quantised",
    "_rebuild_sparse_tensor": "sparse",
    "_rebuild_sparse_csr_tensor": "sparse",
    "_rebuild_nested_tensor": "nested",
    "_rebuild_meta_tensor_no_storage": "without values (meta device)",
    "_rebuild_wrapper_subclass": "of a subclass without values",
    "_rebuild_device_tensor_from_numpy": "of a device that stores numpy arrays",
    "_rebuild_device_tensor_from_cpu_tensor": "of a device that is not supported",
}
_REBUILD = {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"}
_WRAP = {"_rebuild_parameter", "_rebuild_parameter_with_state"}
NUMBERS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
# Called in checkpoints for values that are no weights. None of them is built.
_PLAIN = {
    "_codecs.encode",
    "builtins.bytearray",
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
_OLD_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # Python 2's


def is_allowed(module: str, name: str) -> bool:
    """Whether checkpoints may hold that function, class or constant."""
    path = f"{module}.{name}"
    if module == "torch._utils":
        return name in _UNSUPPORTED or name in _REBUILD or name in _WRAP
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


@dataclass(frozen=True)
class Pickled:
    """The value of one pickle, where it ends, and every storage that it refers to."""

    value: Any
    end: int
    storages: dict[str, StorageRecord]


def read(data: memoryview, start: int, shadowed: Callable[[str], bool]) -> Pickled:
    """Interpret one pickle.

    Args:
        data: the bytes of the file or member.
        start: where the pickle begins.
        shadowed: whether a tensor has an attribute of that name already.

    Raises:
        RefusedError: it asks for anything but tensors and plain data, or for too much of it.
        DamagedError: it is cut short or not a pickle.
    """
    return _Interpreter(data, start, shadowed).run()


class _Interpreter:
    """The state of one run: the stack, the marks and the memo."""

    def __init__(self, data: memoryview, start: int, shadowed: Callable[[str], bool]) -> None:
        self.data = data
        self.at = start
        self.start = start
        self.shadowed = shadowed
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, StorageRecord] = {}
        self.left = MOST_STEPS

    def run(self) -> Pickled:
        try:
            while True:
                code = self.data[self.at]
                self.at += 1
                self.spend(1)
                if code == 0x2E:  # STOP
                    return Pickled(self.stack.pop(), self.at, self.storages)
                step = _STEPS.get(code)
                if step is None:
                    raise DamagedError(f"it has an instruction {code:#04x} of no torch file")
                step(self)
        except (IndexError, KeyError, struct.error) as error:
            raise DamagedError("it ends early or uses values that it does not hold") from error
        except (UnicodeDecodeError, ValueError, TypeError, OverflowError) as error:
            raise DamagedError(shown(error)) from error

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0 or self.at - self.start > LARGEST_PICKLE:
            raise RefusedError(
                f"its pickle has more than {MOST_STEPS:,} steps or {LARGEST_PICKLE >> 20} MB"
            )

    def take(self, count: int) -> bytes:
        end = self.at + count
        if count < 0 or end > len(self.data):
            raise IndexError
        if end - self.start > LARGEST_PICKLE:
            self.spend(MOST_STEPS + 1)
        piece = bytes(self.data[self.at : end])
        self.at = end
        return piece

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        for end in range(self.at, min(self.at + 1000, len(self.data))):
            if self.data[end] == 0x0A:
                piece = bytes(self.data[self.at : end]).decode()
                self.at = end + 1
                return piece
        raise DamagedError("it has a name without an end")

    def text(self, length: int) -> None:
        self.stack.append(str(self.take(length), "utf-8", "surrogatepass"))

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def pack_mark(self) -> None:
        items = self.pop_mark()
        self.stack.append(tuple(items))

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def named(self, module: str, name: str) -> None:
        first = not self.stack and not self.marks and not self.memo
        module = _OLD_NAMES.get(module, module)
        if not is_allowed(module, name):
            path = f"{module}.{name}"
            raise RefusedError(f"it names {quoted(path)}", path, first=first)
        self.stack.append(Named(module, name))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise RefusedError("it names a function by something that is no text")
        self.named(module, name)

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if target is OPAQUE:
            return
        if type(target) is not list:
            raise RefusedError("it appends to something that is no list")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if target is OPAQUE:
            return
        if type(target) is not Pairs or len(items) % 2:
            raise RefusedError("it sets items of something that is no dictionary")
        target.extend(zip(items[::2], items[1::2], strict=True))

    def add_items(self) -> None:
        self.pop_mark()
        if self.stack[-1] is not OPAQUE:
            raise RefusedError("it adds items to something that is no set")

    def persistent(self) -> None:
        wanted = self.stack.pop()
        if type(wanted) is not tuple or len(wanted) not in (5, 6) or _name(wanted[0]) != "storage":
            raise RefusedError("it refers to something outside that is no storage")
        kind, key, count = wanted[1], _name(wanted[2]), wanted[4]
        if not isinstance(kind, Named) or type(key) is not str or not _is_count(count):
            raise RefusedError("it describes a storage without a type, name or size")
        begin = 0
        if len(wanted) == 6 and wanted[5] is not None:  # legacy files: a view into a storage
            view = wanted[5]
            if type(view) is not tuple or len(view) != 3 or not _is_count(view[1]):
                raise RefusedError("it describes a view of a storage without a start")
            begin = view[1]
        record = StorageRecord(kind.name, key, count, begin)
        known = self.storages.setdefault(key, record)
        if (known.kind, known.count) != (record.kind, record.count):
            raise RefusedError("it describes one storage in two ways")
        self.stack.append(record)

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(arguments) is not tuple:
            raise RefusedError("it calls something without a list of arguments")
        self.stack.append(self.called(function, arguments))

    def called(self, function: Any, arguments: tuple[Any, ...], depth: int = 0) -> Any:
        """What a call gives; nothing is called."""
        if not isinstance(function, Named):
            raise RefusedError("it calls something that is no function")
        self.spend(len(arguments))
        name = function.name
        if function.path in ("collections.OrderedDict", "builtins.dict", "collections.defaultdict"):
            return self.dictionary(function, arguments)
        if function.module == "torch._utils":
            if name in _UNSUPPORTED:
                return Unsupported(_UNSUPPORTED[name])
            if name in _REBUILD:
                return _tensor(name, arguments)
            self.check_state(arguments[3] if len(arguments) > 3 else None)
            return self.only_tensor(arguments[0])
        if name == "_rebuild_from_type_v2":
            inner, kind, inner_arguments, state = arguments
            if depth > 4 or type(inner_arguments) is not tuple:
                raise RefusedError("it nests the description of a tensor")
            self.check_state(state)
            if not isinstance(kind, Named):
                raise RefusedError("it describes a tensor without a class")
            return self.called(inner, inner_arguments, depth + 1)
        if name == "Parameter":
            return self.only_tensor(arguments[0])
        if function.path == "numpy.dtype" and arguments[:1] not in [(x,) for x in NUMBERS]:
            raise RefusedError(
                f"it names 'numpy.dtype' of {quoted(arguments[:1] and arguments[0], 20)}",
                "numpy.dtype",
            )
        if function.path == "builtins.bytearray" and any(type(x) is int for x in arguments):
            raise RefusedError("it names 'builtins.bytearray'", "builtins.bytearray")
        return OPAQUE

    def dictionary(self, function: Named, arguments: tuple[Any, ...]) -> Pairs:
        given = arguments[0] if arguments and function.name != "defaultdict" else []
        if type(given) is Pairs:
            self.spend(len(given))
            return Pairs(given)
        if type(given) is not list:
            raise RefusedError("it makes a dictionary of something that is no list of pairs")
        self.spend(len(given))
        if not all(type(pair) in (tuple, list) and len(pair) == 2 for pair in given):
            raise RefusedError("it makes a dictionary of something that is no list of pairs")
        return Pairs((pair[0], pair[1]) for pair in given)

    def only_tensor(self, value: Any) -> Any:
        if not isinstance(value, (TensorRecord, Unsupported)):
            raise RefusedError("it makes a parameter of something that is no tensor")
        return value

    def new_object(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if type(arguments) is not tuple or not isinstance(kind, Named):
            raise RefusedError("it makes an object without a class")
        self.stack.append(self.called(kind, arguments))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, (TensorRecord, Unsupported)):
            self.check_state(state)
        elif type(target) is not Pairs and target is not OPAQUE:
            raise RefusedError("it sets attributes of something that has none")
        # A dictionary's attributes (state_dict()._metadata) are of no use here.

    def check_state(self, state: Any) -> None:
        """Refuse attributes of a tensor that would take the place of a tensor's own."""
        parts = state if type(state) is tuple else (state,)
        self.spend(len(parts))
        if not all(part is None or type(part) is Pairs for part in parts):
            raise RefusedError("it sets a tensor's attributes by something that is no dictionary")
        for part in parts:
            self.spend(1 + len(part or ()))
            for name, _ in part or ():
                if type(name) is not str or self.shadowed(name):
                    raise RefusedError(
                        f"it replaces the attribute {quoted(name)} of a tensor by its own"
                    )


def _name(value: Any) -> Any:
    """Text, which Python 2 wrote as bytes."""
    return value.decode("ascii") if type(value) is bytes else value


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _counts(value: Any, what: str) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > 64 or not all(_is_count(x) for x in value):
        raise RefusedError(f"it describes a tensor whose {what} is not a few whole numbers")
    return value


def _tensor(name: str, arguments: tuple[Any, ...]) -> TensorRecord | Unsupported:
    storage, offset, size, stride = arguments[:4]
    if not isinstance(storage, StorageRecord) or not _is_count(offset):
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


def _push(value: Any) -> Callable[[_Interpreter], object]:
    return lambda run: run.stack.append(value)


def _pack(count: int) -> Callable[[_Interpreter], object]:
    def step(run: _Interpreter) -> None:
        if len(run.stack) < count:
            raise IndexError
        run.stack[-count:] = [tuple(run.stack[-count:])]

    return step


def _long(run: _Interpreter, length: int) -> None:
    if length > 64:  # no number of a checkpoint has more than 512 bits
        run.take(length)
        run.stack.append(OPAQUE)
    else:
        run.stack.append(int.from_bytes(run.take(length), "little", signed=True))


def _old_text(run: _Interpreter, length: int) -> None:
    raw = run.take(length)
    try:
        run.stack.append(raw.decode("ascii"))
    except UnicodeDecodeError:
        run.stack.append(raw)


_STEPS: dict[int, Callable[[_Interpreter], object]] = {
    0x80: lambda run: run.take(1),  # PROTO
    0x95: lambda run: run.take(8),  # FRAME
    0x28: lambda run: run.mark(),
    0x30: lambda run: run.stack.pop(),  # POP
    0x31: lambda run: run.pop_mark(),  # POP_MARK
    0x32: lambda run: run.stack.append(run.stack[-1]),  # DUP
    0x63: lambda run: run.named(run.line(), run.line()),  # GLOBAL
    0x93: lambda run: run.stack_global(),
    0x52: lambda run: run.reduce(),
    0x81: lambda run: run.new_object(),
    0x62: lambda run: run.build(),
    0x51: lambda run: run.persistent(),
    0x61: lambda run: run.append([run.stack.pop()]),  # APPEND
    0x65: lambda run: run.append(run.pop_mark()),  # APPENDS
    0x73: lambda run: run.set_items([*reversed([run.stack.pop(), run.stack.pop()])]),  # SETITEM
    0x75: lambda run: run.set_items(run.pop_mark()),  # SETITEMS
    0x90: lambda run: run.add_items(),
    0x74: lambda run: run.pack_mark(),  # TUPLE
    0x85: _pack(1),
    0x86: _pack(2),
    0x87: _pack(3),
    0x4E: _push(None),
    0x88: _push(True),
    0x89: _push(False),
    0x29: _push(()),
    0x5D: lambda run: run.stack.append([]),
    0x7D: lambda run: run.stack.append(Pairs()),
    0x8F: _push(OPAQUE),  # EMPTY_SET
    0x91: lambda run: (run.pop_mark(), run.stack.append(OPAQUE)),  # FROZENSET
    0x4A: lambda run: run.stack.append(run.number("<i")),
    0x4B: lambda run: run.stack.append(run.number("B")),
    0x4D: lambda run: run.stack.append(run.number("<H")),
    0x47: lambda run: run.stack.append(run.number(">d")),
    0x8A: lambda run: _long(run, run.number("B")),
    0x8B: lambda run: _long(run, run.number("<i")),
    0x58: lambda run: run.text(run.number("<I")),
    0x8C: lambda run: run.text(run.number("B")),
    0x8D: lambda run: run.text(run.number("<Q")),
    0x55: lambda run: _old_text(run, run.number("B")),
    0x54: lambda run: _old_text(run, run.number("<i")),
    0x43: lambda run: run.stack.append(run.take(run.number("B"))),
    0x42: lambda run: run.stack.append(run.take(run.number("<I"))),
    0x8E: lambda run: run.stack.append(run.take(run.number("<Q"))),
    0x96: lambda run: (run.take(run.number("<Q")), run.stack.append(OPAQUE)),  # BYTEARRAY8
    0x68: lambda run: run.stack.append(run.memo[run.number("B")]),
    0x6A: lambda run: run.stack.append(run.memo[run.number("<I")]),
    0x71: lambda run: run.put(run.number("B")),
    0x72: lambda run: run.put(run.number("<I")),
    0x94: lambda run: run.put(len(run.memo)),  # MEMOIZE
}
