"""Converting checkpoints: round trips, hostile files, and the cache of the results."""

import hashlib
import os
import pickle
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import standins
import torch
from forked import failure, run, workers
from helpers import RunsCode, forget_the_peak, left_behind, resident, same_weights

import vitadapter_zoo
from vitadapter_zoo import CheckpointError, MaskRCNN, UnsafeCheckpointError
from vitadapter_zoo.weights import cache

NAME = "adapter-t-deit-3x"
MakeFile = Callable[[str], Path]


@pytest.mark.parametrize("name", [NAME, "vit-t-deit-3x", "adapter-s-dinov2-3x"])
def test_a_round_trip_is_bit_exact(name: str, published_file: MakeFile, tmp_path: Path) -> None:
    source, there, back = published_file(name), tmp_path / "a.safetensors", tmp_path / "b.pth"
    result = run("convert", str(source), "--model", name, "--out", str(there))
    assert result.returncode == 0, result.stderr
    with safetensors.safe_open(there, "pt") as file:
        metadata = file.metadata()
    assert (metadata["model"], metadata["format"], metadata["license"]) == (
        name,
        "pt",
        "Apache-2.0",
    )
    again = ["convert", str(there), "--model", name, "--format", "mmdet", "--out", str(back)]
    assert run(*again).returncode == 0
    # The stand-in's metadata holds a numpy scalar; this test wrote it.
    original = torch.load(source, weights_only=False)
    returned = torch.load(back, weights_only=True)
    assert list(returned["state_dict"]) == list(standins.contract(name))
    for key, value in original["state_dict"].items():
        other = returned["state_dict"][key]
        assert value.dtype == other.dtype
        assert torch.equal(value, other)
    assert len(returned["meta"]["CLASSES"]) == 80
    assert returned["meta"]["epoch"] == 36  # the training's metadata goes along
    assert metadata["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert "exists: give --force" in failure(*again)
    assert run(*again, "--force").returncode == 0


def test_half_precision_survives_a_round_trip(tmp_path: Path) -> None:
    half = {
        key: value.half() if value.is_floating_point() else value
        for key, value in standins.state_dict(NAME).items()
    }
    source, there, back = tmp_path / "h.pth", tmp_path / "a.safetensors", tmp_path / "b.pth"
    torch.save({"state_dict": half, "optimizer": {"state": {}}}, source)
    assert (
        "from float16" in run("convert", str(source), "--model", NAME, "--out", str(there)).stdout
    )
    run(*("convert", str(there), "--model", NAME, "--format", "mmdet"),
        *("--dtype", "float16", "--out", str(back)))  # fmt: skip
    returned = torch.load(back, weights_only=True)["state_dict"]
    assert all(torch.equal(returned[key], value) for key, value in half.items())
    assert {value.dtype for value in returned.values()} == {torch.float16, torch.int64}


def test_shards_have_one_hash_that_changes_with_any_of_them(tiny: MaskRCNN, tmp_path: Path) -> None:
    folder = vitadapter_zoo.save_pretrained(tiny, tmp_path, max_shard_size="30MB")
    shards = sorted(folder.glob("model-0*.safetensors"))
    noted = []
    for number in range(2):
        out = tmp_path / f"{number}.safetensors"
        index = str(folder / "model.safetensors.index.json")
        done = run("convert", index, "--model", NAME, "--out", str(out))
        assert done.returncode == 0, done.stderr
        with safetensors.safe_open(out, "pt") as file:
            noted.append(file.metadata()["source_sha256"])
        # What the README says gives it too.
        pipe = "sha256sum model-*.safetensors | sha256sum"
        summed = subprocess.check_output(pipe, shell=True, cwd=folder, text=True)  # noqa: S602
        assert summed.split()[0] == noted[-1]
        state = safetensors.torch.load_file(shards[-1])
        name = next(name for name, value in state.items() if value.is_floating_point())
        safetensors.torch.save_file(state | {name: state[name] + 1}, shards[-1], {"format": "pt"})
    assert noted[0] != noted[1]


def rewritten(source: Path, target: Path, change: Callable[[bytes], bytes], **extra: Any) -> None:
    """Copy a torch zip with another data.pkl, compression or further members."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.infolist():
            data = old.read(member)
            pickled = member.filename.endswith("data.pkl")
            new.writestr(
                member.filename,
                change(data) if pickled else data,
                extra.get("compression", zipfile.ZIP_STORED),
            )
        for name, data in extra.get("members", {}).items():
            new.writestr(f"{source.stem}/{name}", data)


def refused(path: Path, message: str) -> None:
    forget_the_peak()
    before = resident("VmRSS")
    with pytest.raises(CheckpointError, match=message):
        vitadapter_zoo.load(NAME, checkpoint=path)
    assert resident("VmHWM") - before < 100_000_000


def test_a_second_pickle_in_the_zip_is_refused(tmp_path: Path, zoo_home: Path) -> None:
    source, path, proof = tmp_path / "archive.pth", tmp_path / "evil.pth", tmp_path / "it-ran"
    torch.save(standins.state_dict(NAME), source)
    hidden = {"constants.pkl": pickle.dumps(RunsCode(proof))}
    rewritten(source, path, lambda data: data, members=hidden)
    refused(path, r"constants\.pkl', which is not part of a checkpoint.*Nothing in it was run")
    assert not proof.exists()
    assert left_behind(zoo_home) == []


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    source, path = tmp_path / "archive.pth", tmp_path / "bomb.pth"
    torch.save({"a": torch.ones(3)}, source)
    rewritten(source, path, lambda data: data + bytes(1 << 30), compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 5_000_000
    refused(path, "in compressed form, as zip bombs do")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_declared_tensor_of_ten_gigabytes_is_refused(tmp_path: Path, legacy: bool) -> None:
    source, path = tmp_path / "archive.pth", tmp_path / "huge.pth"
    torch.save({"a": torch.ones(10, 10)}, source, _use_new_zipfile_serialization=not legacy)

    def enlarge(data: bytes) -> bytes:
        assert data.count(b"Kd") == 1  # the storage's 100 elements
        return data.replace(b"Kd", b"\x8a\x05" + (2_500_000_000).to_bytes(5, "little"))

    if legacy:
        path.write_bytes(enlarge(source.read_bytes()))
    else:
        rewritten(source, path, enlarge)
    refused(path, r"claim 10,000,000,000 bytes and the whole file has")


def test_a_view_that_pretends_to_be_large_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "view.pth"
    torch.save({"a": torch.ones(1).expand(2_500_000_000)}, path)
    refused(path, "claim 10,000,000,000 bytes")


class TakesMemory:
    """A pickle that allocates two gigabytes through functions that weights_only allows."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce__(self) -> tuple[Any, ...]:
        if self.how == "bytearray":
            return bytearray, (2_000_000_000,)
        if self.how == "dtype":
            return np.dtype, ("V2000000000",)
        return np.float64(0).__reduce__()[0], (TakesMemory("dtype"),)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("how", ["bytearray", "scalar"])
def test_calls_that_allocate_memory_are_refused(tmp_path: Path, how: str, legacy: bool) -> None:
    path = tmp_path / "bomb.pth"
    content = {"state_dict": {"a": torch.ones(3)}, "meta": TakesMemory(how)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert path.stat().st_size < 10_000
    refused(path, r"it names '(builtins|__builtin__)\.bytearray'|it names 'numpy\.dtype'")


@pytest.mark.parametrize("kind", ["offsets", "shape", "length", "overlap", "beyond 100 MB"])
def test_a_lying_safetensors_header_is_refused(tmp_path: Path, kind: str) -> None:
    headers = {
        "offsets": b'{"a":{"dtype":"F32","shape":[2500000000],"data_offsets":[0,10000000000]}}',
        "shape": b'{"a":{"dtype":"F32","shape":[100],"data_offsets":[0,8]}}',
        "length": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        "overlap": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        "beyond 100 MB": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    }
    header = headers[kind]
    length = {"length": len(header) + 50_000_000, "beyond 100 MB": 1 << 40}.get(kind, len(header))
    path = tmp_path / "lying.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header + bytes(8))
    refused(path, "damaged or truncated safetensors|is not a checkpoint")


def test_a_class_in_the_pickle_is_not_built(tmp_path: Path) -> None:
    path = tmp_path / "class.pth"
    torch.save({"state_dict": standins.state_dict(NAME), "meta": Path("/etc")}, path)
    with pytest.raises(UnsafeCheckpointError, match="Nothing in it was run"):
        vitadapter_zoo.load(NAME, checkpoint=path)


def test_the_cache_is_listed_verified_and_pruned(
    published_file: MakeFile, zoo_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(published_file(NAME))
    done = run("download", NAME, "--checkpoint", source, "--quiet")
    assert done.returncode == 0, done.stderr
    assert NAME in done.stdout
    assert run("cache", "path").stdout.strip() == str(zoo_home)
    assert f"1 in {zoo_home}" in run("cache", "list").stdout
    assert source in run("cache", "list").stdout
    assert "intact" in run("cache", "verify").stdout
    assert "0 removed" in run("cache", "prune", "--older-than", "1d").stdout
    (item,) = cache.listing()
    # The names of a person's own files, one of them with eight digits.
    foreign = ["finetuned-20240101.safetensors", "notes.txt"]
    for name in foreign:
        (item.entry.weights.parent / name).write_text("mine")
    status = item.entry.weights.stat()
    data = bytearray(item.entry.weights.read_bytes())
    data[-1] ^= 1
    item.entry.weights.write_bytes(data)
    os.utime(item.entry.weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    # Size and time are trusted at a start; `verify` hashes.
    assert not same_weights(vitadapter_zoo.load(NAME, checkpoint=source), NAME)
    result = run("cache", "verify")
    assert result.returncode == 1
    assert "1 damaged" in result.stderr
    os.utime(item.entry.weights)
    assert same_weights(vitadapter_zoo.load(NAME, checkpoint=source), NAME)
    assert "intact" in run("cache", "verify").stdout
    two_days_ago = time.time() - 2 * 86400
    os.utime(item.entry.record, (two_days_ago, two_days_ago))
    assert "0 removed" in run("cache", "prune", "--older-than", "3d").stdout
    assert "1 removed" in run("cache", "prune", "--older-than", "1d").stdout
    assert left_behind(zoo_home) == foreign
    assert "0 removed" in run("cache", "prune", "--all").stdout
    assert left_behind(zoo_home) == foreign
    assert "is not an age" in failure("cache", "prune", "--older-than", "soon")
    assert "offline mode" in failure("download", "vit-t-deit-3x", "--offline")
    assert "name the models" in failure("download")


READ_ONLY = """
import os, stat, sys, ctypes
from pathlib import Path
import helpers, vitadapter_zoo as zoo

# root writes to what nobody may write to, unless it gives up the right (CAP_DAC_OVERRIDE).
if os.getuid() == 0:
    class Header(ctypes.Structure):
        _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]
    header, sets = Header(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(ctypes.byref(header), sets) == 0
    sets[0] &= ~2
    assert libc.capset(ctypes.byref(header), sets) == 0
home = Path(os.environ["VITADAPTER_ZOO_HOME"])
try:
    (home / "probe").touch()
    print("WRITABLE")
except PermissionError:
    pass
print(helpers.same_weights(zoo.load("adapter-t-deit-3x", checkpoint=sys.argv[1]), sys.argv[2]))
try:
    zoo.load("vit-t-deit-3x", checkpoint=sys.argv[3])
except zoo.ZooError as error:
    print(error)
"""


def test_a_read_only_cache_is_usable(published_file: MakeFile, zoo_home: Path) -> None:
    source = str(published_file(NAME))
    vitadapter_zoo.load(NAME, checkpoint=source)
    (weights,) = zoo_home.rglob("*.safetensors")
    os.utime(weights)  # as copying a cache to its place does
    folders = [zoo_home, *(path for path in zoo_home.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    result = workers().run(READ_ONLY, source, NAME, str(published_file("vit-t-deit-3x")))
    for folder in folders:
        folder.chmod(0o755)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first == "True"
    assert "cannot write to" in second
    assert "VITADAPTER_ZOO_HOME" in second


def test_cards_on_the_command_line(tmp_path: Path) -> None:
    assert "# vit-t-deit-3x" in run("card", "vit-t-deit-3x").stdout
    assert run("card", "--all", "--out", str(tmp_path)).returncode == 0
    assert {path.stem for path in tmp_path.iterdir()} == set(vitadapter_zoo.list_models())
