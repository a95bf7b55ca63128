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

import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vitadapter_zoo.text import quoted, shown
from vitadapter_zoo.weights.pickle_values import (
    NUMBERS,
    OLD_NAMES,
    OPAQUE,
    REBUILD,
    UNSUPPORTED,
    DamagedError,
    Named,
    Pairs,
    RefusedError,
    StorageRecord,
    TensorRecord,
    Unsupported,
    is_allowed,
    is_count,
    tensor,
    text_of,
)

# Far above any checkpoint of these networks with its optimizer, which has about 150,000.
MOST_STEPS = 2_000_000
LARGEST_PICKLE = 32 << 20  # bytes


@dataclass(frozen=True)
class Pickled:
    """The value of one pickle, the offset of its end, and every storage that it refers to."""

    value: Any
    end: int
    storages: dict[str, StorageRecord]


def read(data: memoryview, start: int, shadowed: Callable[[str], bool]) -> Pickled:
    """Interpret one pickle.

    Args:
        data: the bytes of the file or member.
        start: offset of the pickle.
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
                code = bytes(self.data[self.at : self.at + 1])
                self.at += 1
                self.spend(1)
                if code == pickle.STOP:
                    return Pickled(self.stack.pop(), self.at, self.storages)
                step = _STEPS.get(code)
                if step is None:
                    raise DamagedError(f"it has an instruction {code!r} of no torch file")
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

    def opaque(self, _content: object) -> None:
        self.stack.append(OPAQUE)

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def named(self, module: str, name: str) -> None:
        module = OLD_NAMES.get(module, module)
        if not is_allowed(module, name):
            path = f"{module}.{name}"
            # Legacy files put the word "module" before the class of a whole network.
            first = all(type(x) is str for part in (*self.marks, self.stack) for x in part)
            raise RefusedError(f"it names {quoted(path)}", path, first=first)
        self.stack.append(Named(module, name))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise RefusedError("it names a function by something that is not text")
        self.named(module, name)

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if target is OPAQUE:
            return
        if type(target) is not list:
            raise RefusedError("it appends to something that is not a list")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if target is OPAQUE:
            return
        if type(target) is not Pairs or len(items) % 2:
            raise RefusedError("it sets items of something that is not a dictionary")
        target.extend(zip(items[::2], items[1::2], strict=True))

    def add_items(self) -> None:
        self.pop_mark()
        if self.stack[-1] is not OPAQUE:
            raise RefusedError("it adds items to something that is not a set")

    def persistent(self) -> None:
        wanted = self.stack.pop()
        if (
            type(wanted) is not tuple
            or len(wanted) not in (5, 6)
            or text_of(wanted[0]) != "storage"
        ):
            raise RefusedError("it refers to something outside that is not a storage")
        kind, key, count = wanted[1], text_of(wanted[2]), wanted[4]
        if not isinstance(kind, Named) or type(key) is not str or not is_count(count):
            raise RefusedError("it describes a storage without a type, name or size")
        begin = 0
        if len(wanted) == 6 and wanted[5] is not None:  # legacy files: a view into a storage
            view = wanted[5]
            if type(view) is not tuple or len(view) != 3 or not is_count(view[1]):
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
        """Return the value that a call stands for; nothing is called."""
        if not isinstance(function, Named):
            raise RefusedError("it calls something that is not a function")
        self.spend(len(arguments))
        name = function.name
        if function.path in ("collections.OrderedDict", "builtins.dict", "collections.defaultdict"):
            return self.dictionary(function, arguments)
        if function.module == "torch._utils":
            if name in UNSUPPORTED:
                return Unsupported(UNSUPPORTED[name])
            if name in REBUILD:
                return tensor(name, arguments)
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
            given = arguments[0] if arguments else None
            # The text of a list whose parts refer to each other could be endless.
            text = quoted(given, 20) if type(given) in (str, bytes) else "something else than text"
            raise RefusedError(f"it names 'numpy.dtype' of {text}", "numpy.dtype")
        if name in ("bytearray", "bytes") and any(type(x) is int for x in arguments):
            raise RefusedError(f"it names {quoted(function.path)} of a number", function.path)
        return OPAQUE

    def dictionary(self, function: Named, arguments: tuple[Any, ...]) -> Pairs:
        given = arguments[0] if arguments and function.name != "defaultdict" else []
        if type(given) is Pairs:
            self.spend(len(given))
            return Pairs(given)
        if type(given) is not list:
            raise RefusedError("it makes a dictionary of something that is not a list of pairs")
        self.spend(len(given))
        if not all(type(pair) in (tuple, list) and len(pair) == 2 for pair in given):
            raise RefusedError("it makes a dictionary of something that is not a list of pairs")
        return Pairs((pair[0], pair[1]) for pair in given)

    def only_tensor(self, value: Any) -> Any:
        if not isinstance(value, (TensorRecord, Unsupported)):
            raise RefusedError("it makes a parameter of something that is not a tensor")
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
        """Refuse attributes that would replace a tensor's own."""
        parts = state if type(state) is tuple else (state,)
        self.spend(len(parts))
        if not all(part is None or type(part) is Pairs for part in parts):
            raise RefusedError(
                "it sets a tensor's attributes by something that is not a dictionary"
            )
        for part in parts:
            self.spend(1 + len(part or ()))
            for name, _ in part or ():
                if type(name) is not str or self.shadowed(name):
                    label = quoted(name) if type(name) is str else "without a name"
                    raise RefusedError(f"it replaces the attribute {label} of a tensor by its own")


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


_STEPS: dict[bytes, Callable[[_Interpreter], object]] = {
    pickle.PROTO: lambda run: run.take(1),
    pickle.FRAME: lambda run: run.take(8),
    pickle.MARK: lambda run: run.mark(),
    pickle.POP: lambda run: run.stack.pop(),
    pickle.POP_MARK: lambda run: run.pop_mark(),
    pickle.DUP: lambda run: run.stack.append(run.stack[-1]),
    pickle.GLOBAL: lambda run: run.named(run.line(), run.line()),
    pickle.STACK_GLOBAL: lambda run: run.stack_global(),
    pickle.REDUCE: lambda run: run.reduce(),
    pickle.NEWOBJ: lambda run: run.new_object(),
    pickle.BUILD: lambda run: run.build(),
    pickle.BINPERSID: lambda run: run.persistent(),
    pickle.APPEND: lambda run: run.append([run.stack.pop()]),
    pickle.APPENDS: lambda run: run.append(run.pop_mark()),
    pickle.SETITEM: lambda run: run.set_items([*reversed([run.stack.pop(), run.stack.pop()])]),
    pickle.SETITEMS: lambda run: run.set_items(run.pop_mark()),
    pickle.ADDITEMS: lambda run: run.add_items(),
    pickle.TUPLE: lambda run: run.pack_mark(),
    pickle.TUPLE1: _pack(1),
    pickle.TUPLE2: _pack(2),
    pickle.TUPLE3: _pack(3),
    pickle.NONE: _push(None),
    pickle.NEWTRUE: _push(True),
    pickle.NEWFALSE: _push(False),
    pickle.EMPTY_TUPLE: _push(()),
    pickle.EMPTY_LIST: lambda run: run.stack.append([]),
    pickle.EMPTY_DICT: lambda run: run.stack.append(Pairs()),
    pickle.EMPTY_SET: _push(OPAQUE),
    pickle.FROZENSET: lambda run: run.opaque(run.pop_mark()),
    pickle.BININT: lambda run: run.stack.append(run.number("<i")),
    pickle.BININT1: lambda run: run.stack.append(run.number("B")),
    pickle.BININT2: lambda run: run.stack.append(run.number("<H")),
    pickle.BINFLOAT: lambda run: run.stack.append(run.number(">d")),
    pickle.LONG1: lambda run: _long(run, run.number("B")),
    pickle.LONG4: lambda run: _long(run, run.number("<i")),
    pickle.BINUNICODE: lambda run: run.text(run.number("<I")),
    pickle.SHORT_BINUNICODE: lambda run: run.text(run.number("B")),
    pickle.BINUNICODE8: lambda run: run.text(run.number("<Q")),
    pickle.SHORT_BINSTRING: lambda run: _old_text(run, run.number("B")),
    pickle.BINSTRING: lambda run: _old_text(run, run.number("<i")),
    pickle.SHORT_BINBYTES: lambda run: run.stack.append(run.take(run.number("B"))),
    pickle.BINBYTES: lambda run: run.stack.append(run.take(run.number("<I"))),
    pickle.BINBYTES8: lambda run: run.stack.append(run.take(run.number("<Q"))),
    pickle.BYTEARRAY8: lambda run: run.opaque(run.take(run.number("<Q"))),
    pickle.BINGET: lambda run: run.stack.append(run.memo[run.number("B")]),
    pickle.LONG_BINGET: lambda run: run.stack.append(run.memo[run.number("<I")]),
    pickle.BINPUT: lambda run: run.put(run.number("B")),
    pickle.LONG_BINPUT: lambda run: run.put(run.number("<I")),
    pickle.MEMOIZE: lambda run: run.put(len(run.memo)),
}
