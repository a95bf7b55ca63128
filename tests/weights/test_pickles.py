"""Torch files from unknown sources and other tools, read without running their code."""

import argparse
import collections
import io
import pickle
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import workers
from helpers import forget_the_peak, resident
from torch import Tensor

from vitadapter_zoo import CheckpointError, UnsafeCheckpointError
from vitadapter_zoo.weights import checkpoint

ALLOWANCE = 300_000_000  # bytes beside the file's own size
SECONDS = 10
BOUNDED = """
import resource, sys
from pathlib import Path
from vitadapter_zoo import CheckpointError
from vitadapter_zoo.weights import checkpoint
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
# The file's size, and its two maps: to be interpreted, and for its tensors.
most = held + {allowance} + 3 * Path(sys.argv[1]).stat().st_size
resource.setrlimit(resource.RLIMIT_AS, (most, most))
used = resource.getrusage(resource.RUSAGE_SELF)
limit = int(used.ru_utime + used.ru_stime) + {seconds}
resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
try:
    checkpoint.read(Path(sys.argv[1]), "it")
except CheckpointError as error:
    print(error)
"""


def saved(content: object, path: Path, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def zip_with(pickled: bytes, path: Path, storages: dict[str, bytes] | None = None) -> Path:
    """A torch zip around a pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for name, data in (storages or {}).items():
            archive.writestr(f"archive/data/{name}", data)
        archive.writestr("archive/version", "3\n")
    return path


def read_within_limits(path: Path) -> str:
    """Return the error of reading the file, or no text.

    It is read in a process of its own, which the kernel ends after ``SECONDS`` of processor time
    and which gets no more memory than the file's size and an allowance: if the reader has
    no limits, the test fails and the machine is not affected.
    """
    code = BOUNDED.format(seconds=SECONDS, allowance=ALLOWANCE)
    done = workers().run(code, str(path))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) < 2000
    return done.stdout


def as_torch_reads(path: Path) -> dict[str, Tensor]:
    loaded = torch.load(path, weights_only=True)
    return dict(loaded.get("state_dict", loaded))


HABITS: dict[str, Callable[[], Any]] = {
    "one dictionary twice": lambda: (lambda sd: {"state_dict": sd, "best": sd})(weights()),
    "parameters inside the optimizer": lambda: (
        lambda sd: {"state_dict": sd, "optimizer": {"params": list(sd.values())}}
    )(weights()),
    "one flat buffer": lambda: (
        lambda flat: {"a": flat[:6].view(2, 3), "b": flat[6:], "c": flat[2:8]}
    )(torch.arange(10.0)),
    "transposed, sliced and empty": lambda: {
        "t": torch.arange(6.0).view(2, 3).t(), "s": torch.arange(9)[::2],
        "e": torch.zeros(0, 3), "scalar": torch.tensor(2.5),
    },
    "expanded": lambda: {"a": torch.ones(1).expand(3), "b": torch.zeros(50)},
    "every dtype": lambda: {
        str(t): torch.arange(4).to(t)
        for t in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
                  torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64)
    },
    "parameters with attributes": lambda: {"a": attributed()},
    "plain data beside": lambda: {
        "state_dict": weights(),
        "meta": {1: {2, 3}, "c": collections.Counter("abca"), "z": 1 + 2j, "b": b"\x00\xff",
                 "ba": bytearray(b"abc"), "size": torch.Size([2, 3]), "dtype": torch.float32,
                 "device": torch.device("cpu"), "big": 1 << 200, "t": ((), (1,), [None, True])},
    },
    "a state_dict with its versions": lambda: torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2)
    ).state_dict(),
}  # fmt: skip


def weights() -> dict[str, Tensor]:
    return {"a": torch.arange(6.0).view(2, 3), "b": torch.nn.Parameter(torch.ones(2)).detach()}


def attributed() -> torch.nn.Parameter:
    parameter: Any = torch.nn.Parameter(torch.ones(3))
    parameter.learning_rate_factor = 0.1
    return parameter


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("habit", HABITS)
def test_what_torch_reads_is_read_the_same(habit: str, legacy: bool, tmp_path: Path) -> None:
    path = saved(HABITS[habit](), tmp_path / "a.pth", legacy)
    found = checkpoint.read(path, "it").tensors
    expected = as_torch_reads(path)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].stride() == value.stride()
        assert torch.equal(found[name], value)


@pytest.mark.parametrize("legacy", [False, True])
def test_shared_memory_counts_once_in_a_file_that_is_nearly_all_weights(
    legacy: bool, tmp_path: Path
) -> None:
    flat = torch.arange(200_000.0)
    state = {"a": flat, "b": flat[10:], "c": flat[:150_000].view(300, 500)}
    content = {"state_dict": state, "best": state, "optimizer": [*state.values()]}
    path = tmp_path / "shared.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert path.stat().st_size < 1.1 * flat.nbytes
    found = checkpoint.read(path, "it").tensors
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_a_dtype_that_has_no_storage_class(tmp_path: Path) -> None:
    # torch itself cannot read it from the legacy format.
    path = saved({"f8": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "a.pth")
    assert checkpoint.read(path, "it").tensors["f8"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_that_torch_save_takes(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"state_dict": weights(), "meta": {"epoch": 3}}, path, pickle_protocol=protocol)
    read = checkpoint.read(path, "it")
    assert torch.equal(read.tensors["a"], weights()["a"])
    assert read.metadata == {"epoch": 3}


def test_numbers_of_the_other_byte_order(tmp_path: Path) -> None:
    path = tmp_path / "big.pth"
    with zipfile.ZipFile(saved(weights(), tmp_path / "a.pth")) as old, \
            zipfile.ZipFile(path, "w") as new:  # fmt: skip
        for member in old.infolist():
            data = old.read(member)
            if "/data/" in member.filename:
                data = np.frombuffer(data, "<f4").astype(">f4").tobytes()
            new.writestr(member.filename, b"big" if "byteorder" in member.filename else data)
    assert torch.equal(checkpoint.read(path, "it").tensors["a"], weights()["a"])


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments, *([] if state is None else [state]))

    def __reduce__(self) -> Any:
        return self.parts


def long_text(size: int) -> str:
    return "x" * size


LONG = 3_000_000
TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQK\x00)))\x89Ntq\x02R"
)
STATE = {"a": torch.ones(3)}
GREEDY: dict[str, Callable[[], bytes]] = {
    "a string encoded again and again": lambda: b"\x80\x02c_codecs\nencode\nq\x00X"
    + struct.pack("<I", LONG) + b"x" * LONG + b"q\x01X\x06\x00\x00\x00utf-16q\x020"
    + b"0" + b"(" + b"h\x00h\x01h\x02\x86R" * 100_000 + b"l.",
    "encoded texts in a tuple": lambda: b"\x80\x02c_codecs\nencode\nq\x00X"
    + struct.pack("<I", LONG) + b"x" * LONG + b"q\x01X\x06\x00\x00\x00utf-16q\x02000("
    + b"h\x00h\x01h\x02\x86R" * 100_000 + b"t.",
    "ordered dictionaries of one long list": lambda: b"\x80\x02](" + b"K\x01K\x01\x86" * 100_000
    + b"eq\x010ccollections\nOrderedDict\nq\x000(" + b"h\x00h\x01\x85R" * 200_000 + b"t.",
    "counters of one long text": lambda: b"\x80\x02X" + struct.pack("<I", LONG) + b"x" * LONG
    + b"q\x010ccollections\nCounter\nq\x000(" + b"h\x00h\x01\x85R" * 200_000 + b"t.",
    "sets of one long list": lambda: b"\x80\x02](" + b"K\x01" * 100_000
    + b"eq\x010cbuiltins\nset\nq\x000(" + b"h\x00h\x01\x85R" * 200_000 + b"t.",
    "torch.Size of a long list": lambda: b"\x80\x02](" + b"K\x01" * 100_000
    + b"eq\x010ctorch\nSize\nq\x000(" + b"h\x00h\x01\x85R" * 200_000 + b"t.",
    "a bytearray over two instructions": lambda: b"\x80\x02cbuiltins\nbytearray\nJ"
    + struct.pack("<i", 2_000_000_000) + b"\x85R.",
    "a bytearray through the memo": lambda: b"\x80\x02cbuiltins\nbytearray\nq\x05J"
    + struct.pack("<i", 2_000_000_000) + b"q\x060h\x06\x85R.",
    "a billion laughs": lambda: b"\x80\x02]q\x00"
    + b"".join(b"](h" + bytes([i]) * 1 + (b"h" + bytes([i])) * 50 + b"eq" + bytes([i + 1])
               for i in range(200)) + b".",
    "a billion laughs as a type of numbers": lambda: b"\x80\x02cnumpy\ndtype\nq\xff]q\x00"
    + b"".join(b"](h" + bytes([i]) + (b"h" + bytes([i])) * 50 + b"eq" + bytes([i + 1])
               for i in range(200)) + b"q\xfe0h\xffh\xfe\x85R.",
    "a billion laughs as an attribute's name": lambda: b"\x80\x02]q\x00"
    + b"".join(b"](h" + bytes([i]) + (b"h" + bytes([i])) * 50 + b"eq" + bytes([i + 1])
               for i in range(200)) + b"q\xfe0" + TENSOR + b"}h\xfeNsb.",
    "a hundred thousand nested lists": lambda: b"\x80\x02" + b"](" * 100_000 + b"e" * 100_000
    + b".",
    "a hundred thousand nested tuples": lambda: b"\x80\x02)" + b"\x85" * 100_000 + b".",
    "a million empty dictionaries": lambda: b"\x80\x02(" + b"}" * 1_000_000 + b"t.",
    "three million steps": lambda: b"\x80\x02" + b"N0" * 1_500_000 + b"N.",
    "numbers whose hashes collide": lambda: b"\x80\x02}("
    + b"".join(b"\x8a\x10" + (k * ((1 << 61) - 1)).to_bytes(16, "little") + b"N"
               for k in range(1, 100_000)) + b"u.",
    "a long state looked at again and again": lambda: pickle_of_states(),
    "long numbers": lambda: b"\x80\x02(" + (b"\x8b" + struct.pack("<i", LONG) + b"\x01" * LONG)
    + b"t.",
    "a text longer than the file": lambda: b"\x80\x02X\xff\xff\xff\xffabc.",
    "a missing memo": lambda: b"\x80\x02h\x07.",
    "an empty stack": lambda: b"\x80\x02R.",
    "no end": lambda: b"\x80\x02(((",
    "nothing": lambda: b"",
}  # fmt: skip


def pickle_of_states() -> bytes:
    """Attributes of one tensor set 10,000 times from one dictionary of 10,000 names."""
    names = b"".join(b"X\x06\x00\x00\x00" + b"%06d" % i + b"N" for i in range(10_000))
    return b"\x80\x02}(" + names + b"uq\x01" + TENSOR + b"h\x01b" * 10_000 + b"."


@pytest.mark.parametrize("kind", GREEDY)
def test_no_pickle_takes_more_than_its_file_and_an_allowance(kind: str, tmp_path: Path) -> None:
    path = zip_with(GREEDY[kind](), tmp_path / "greedy.pth", {"0": bytes(4)})
    message = read_within_limits(path)
    assert "refused" in message or "damaged" in message or "holds no state_dict" in message \
        or "is not a tensor" in message  # fmt: skip


@pytest.mark.parametrize("how", ["state", "build"])
@pytest.mark.parametrize("name", ["to", "contiguous", "is_floating_point", "numpy"])
def test_attributes_that_shadow_a_tensors_own_are_refused(
    name: str, how: str, tmp_path: Path
) -> None:
    value = torch.ones(3)
    if how == "state":
        content: Any = {"a": value}
        setattr(value, name, 3)
    else:
        content = {"a": Call(torch._utils._rebuild_parameter, value, True, {}, state={name: 3})}
    path = saved(content, tmp_path / "a.pth")
    with pytest.raises(UnsafeCheckpointError, match=f"replaces the attribute '{name}'"):
        checkpoint.read(path, "it")


def test_a_storage_in_two_ways_and_a_tensor_beyond_its_storage(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(10, 10)}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        pickled = archive.read(name)
    assert pickled.count(b"K\nK\n\x86") == 1  # the shape
    path = zip_with(pickled.replace(b"K\nK\n\x86", b"K\nK\x0b\x86"), tmp_path / "a.pth",
                    {"0": bytes(400)})  # fmt: skip
    with pytest.raises(UnsafeCheckpointError, match=r"reaches beyond its storage|claim"):
        checkpoint.read(path, "it")
    path = zip_with(pickled, tmp_path / "b.pth", {"0": bytes(300)})
    with pytest.raises(CheckpointError, match="storage '0' is cut short"):
        checkpoint.read(path, "it")
    path = zip_with(pickled, tmp_path / "c.pth", {"1": bytes(400)})
    with pytest.raises(CheckpointError, match="storage '0' is missing"):
        checkpoint.read(path, "it")


def test_a_zip_with_a_vast_directory_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "many.pth"
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(300_000):
            archive.writestr(f"archive/data/{index}", b"")
    forget_the_peak()
    before = resident("VmRSS")
    with pytest.raises(UnsafeCheckpointError, match="zip directory of"):
        checkpoint.read(path, "it")
    assert resident("VmHWM") - before < 100_000_000


def test_kinds_of_tensors_without_plain_numbers_are_refused_by_name(tmp_path: Path) -> None:
    kinds = {
        "meta": (torch.empty(3, device="meta"), "without values"),
        "sparse": (torch.eye(3).to_sparse(), "is sparse"),
        "quantised": (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantised"),
        "negated": (torch.ones(2, dtype=torch.complex64).conj(), "conjugated"),
    }
    for kind, (value, message) in kinds.items():
        path = saved({"weight\x1b": value}, tmp_path / f"{kind}.pth")
        with pytest.raises(CheckpointError, match=rf"'weight\\x1b' .*{message}"):
            checkpoint.read(path, "it")


class Model(torch.nn.Module):
    """Somebody's own class."""


@pytest.mark.parametrize("legacy", [False, True])
def test_the_advice_fits_the_file(legacy: bool, tmp_path: Path) -> None:
    whole = saved(Model(), tmp_path / "model.pth", legacy)
    with pytest.raises(UnsafeCheckpointError) as caught:
        checkpoint.read(whole, "it")
    assert f"a whole Python object, '{Model.__module__}.Model'" in str(caught.value)
    assert "weights_only=False).state_dict(), 'weights.pth')" in str(caught.value)
    for extra in (argparse.Namespace(lr=1), collections.deque([1.0]), np.arange(3)):
        path = saved({"args": extra, "state_dict": STATE}, tmp_path / "args.pth", legacy)
        with pytest.raises(UnsafeCheckpointError) as caught:
            checkpoint.read(path, "it")
        assert "beside tensors and plain data it holds an object" in str(caught.value)
        assert "'state_dict': checkpoint['state_dict']}" in str(caught.value)
    for function in (subprocess.check_output, getattr, eval, pickle.loads):
        path = saved({"z": Call(function, "1"), **STATE}, tmp_path / "evil.pth", legacy)
        with pytest.raises(UnsafeCheckpointError) as caught:
            checkpoint.read(path, "it")
        assert "Get the file from its publisher again" in str(caught.value)
        assert "weights_only=False" not in str(caught.value)


def test_two_values_for_one_name_and_names_that_are_hostile(tmp_path: Path) -> None:
    pickled = b"\x80\x02}(" + (b"X\x01\x00\x00\x00a" + b"N") * 2 + b"u."
    assert "'a' is not a tensor" in read_within_limits(zip_with(pickled, tmp_path / "a.pth"))
    path = saved({"\x1b[2J" + "n" * 1_000_000: 3, **STATE}, tmp_path / "b.pth")
    message = read_within_limits(path)
    assert r"'\x1b[2Jnnn" in message
    assert len(message) < 400


def test_class_names_of_mmdet_2_and_3(tmp_path: Path) -> None:
    for meta in ({"CLASSES": ("cat", "dog")}, {"dataset_meta": {"classes": ["cat", "dog"]}}):
        path = saved({"state_dict": STATE, "meta": meta}, tmp_path / "a.pth")
        assert checkpoint.read(path, "it").classes == ("cat", "dog")
