"""Checkpoints with one thing changed, against ``torch.load(weights_only=True)`` as the oracle."""

import collections
import io
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from examples import MANY, SECONDS
from vitadapter_zoo import CheckpointError
from vitadapter_zoo.weights import checkpoint

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8,
          torch.bool]  # fmt: skip
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False)
    | names
    | st.binary(max_size=20)
    | st.sampled_from([torch.float32, torch.Size([1, 2]), torch.device("cpu"), 1 + 2j, {1, "a"}]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(names, inner, max_size=4)
    ),
    max_leaves=12,
)


STEPS = [b"R", b"b", b"0", b"2", b"N", b"Q", b"K\x00", b"\x85", b"h\x01", b"}", b"]", b"(", b".",
         b"\x8a\x05\xff\xff\xff\xff\x7f", b"ccollections\nCounter\n",
         b"ctorch\nSize\n"]  # fmt: skip


@st.composite
def states(draw: st.DrawFn) -> dict[str, Tensor]:
    """A state dict whose tensors may be views of each other's memory."""
    made: dict[str, Tensor] = collections.OrderedDict()
    for name in draw(st.lists(names, min_size=1, max_size=5, unique=True)):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        value = torch.arange(int(torch.tensor(shape).prod()) if shape else 1) % 2
        value = value.reshape(shape).to(draw(st.sampled_from(DTYPES)))
        view = draw(st.sampled_from(["own", "transposed", "parameter", "alias", "expanded"]))
        if view == "transposed" and value.ndim > 1:
            value = value.transpose(0, 1)
        elif view == "parameter" and value.is_floating_point():
            value = torch.nn.Parameter(value)
        elif view == "alias" and made:
            value = draw(st.sampled_from(list(made.values())))
        elif view == "expanded" and value.ndim:
            value = value[:1].expand(shape[0] and 3, *shape[1:])
        made[name] = value
    return made


@st.composite
def contents(draw: st.DrawFn) -> Any:
    """A checkpoint: a bare state dict, or one with metadata and an optimizer."""
    state = draw(states())
    if draw(st.booleans()):
        return state
    more = draw(st.dictionaries(names, plain, max_size=3))
    return {**more, "state_dict": state, "meta": draw(plain), "optimizer": list(state.values())}


@st.composite
def changed(draw: st.DrawFn, data: bytes) -> bytes:
    """One change of a pickle: a byte, a piece left out, doubled, or moved, or another number."""
    at = draw(st.integers(0, len(data) - 1))
    length = draw(st.integers(1, 12))
    piece = data[at : at + length]
    kind = draw(st.sampled_from(["byte", "cut", "double", "move", "insert"]))
    if kind == "byte":
        return data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
    if kind == "cut":
        return data[:at] + data[at + length :]
    if kind == "double":
        return data[:at] + piece + data[at:]
    if kind == "insert":
        step = draw(st.sampled_from(STEPS))
        return data[:at] + step + data[at:]
    target = draw(st.integers(0, len(data) - 1))
    rest = data[:at] + data[at + length :]
    return rest[:target] + piece + rest[target:]


def oracle(path: Path) -> dict[str, Tensor] | None:
    """Read the state dict with torch; None if it refuses the file or finds no state dict."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, weights_only=True)
    except Exception:
        return None
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not state:
        return None
    fine = all(isinstance(x, Tensor) and type(n) is str for n, x in state.items())
    return dict(state) if fine else None


def compare(path: Path, *, untouched: bool) -> None:
    start, message = time.process_time(), ""
    found: dict[str, Tensor] | None
    try:
        found = checkpoint.read(path, "it").tensors
    except CheckpointError as error:
        found, message = None, str(error)
    assert time.process_time() - start < SECONDS
    assert len(message) < 2000
    assert message.replace("\n", "").isprintable() or not message
    expected = oracle(path)
    if untouched and expected is not None:
        assert found is not None, message
    if found is None or expected is None:
        return
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert torch.equal(found[name].nan_to_num() if value.is_floating_point() else found[name],
                           value.nan_to_num() if value.is_floating_point() else value)  # fmt: skip


def rewritten(content: Any, data: st.DataObject, path: Path, legacy: bool) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    if legacy:
        path.write_bytes(data.draw(changed(buffer.getvalue())))
        return
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.infolist():
            bytes_ = old.read(member)
            if member.filename.endswith("data.pkl"):
                bytes_ = data.draw(changed(bytes_))
            new.writestr(member.filename, bytes_)


COUNTS = [200, pytest.param(MANY, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
def test_a_whole_checkpoint_is_read_as_torch_reads_it(count: int, tmp_path: Path) -> None:
    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(contents(), st.booleans())
    def check(content: Any, legacy: bool) -> None:
        path = tmp_path / "a.pth"
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        compare(path, untouched=True)

    check()


@pytest.mark.parametrize("count", COUNTS)
def test_a_changed_checkpoint_ends_in_one_error_or_the_oracles_weights(
    count: int, tmp_path: Path
) -> None:
    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(contents(), st.booleans(), st.data())
    def check(content: Any, legacy: bool, data: st.DataObject) -> None:
        path = tmp_path / "a.pth"
        rewritten(content, data, path, legacy)
        compare(path, untouched=False)

    check()
