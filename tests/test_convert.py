import pickle
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import standins
import torch
from helpers import left_behind, same_weights
from test_cli import failure, run
from test_loader import RunsCode

import vitadapter_zoo
from vitadapter_zoo import CheckpointError, UnsafeCheckpointError, cache

NAME = "adapter-t-deit-3x"
MakeFile = Callable[[str], Path]


@pytest.mark.parametrize("name", [NAME, "vit-t-deit-3x"])
def test_there_and_back_is_bit_exact(name: str, published_file: MakeFile, tmp_path: Path) -> None:
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
    assert len(metadata["source_sha256"]) == 64
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
    assert "is there already: give --force" in failure(*again)
    assert run(*again, "--force").returncode == 0


def test_half_precision_survives_the_way_there_and_back(tmp_path: Path) -> None:
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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=message):
        vitadapter_zoo.load(NAME, checkpoint=path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 500_000  # KB


def test_a_second_pickle_in_the_zip_is_refused(tmp_path: Path, zoo_home: Path) -> None:
    source, path, proof = tmp_path / "archive.pth", tmp_path / "evil.pth", tmp_path / "it-ran"
    torch.save(standins.state_dict(NAME), source)
    hidden = {"constants.pkl": pickle.dumps(RunsCode(proof))}
    rewritten(source, path, lambda data: data, members=hidden)
    refused(path, r"constants\.pkl', which is no part of a checkpoint.*Nothing in it was run")
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
    foreign = item.entry.weights.parent / "notes.txt"
    foreign.write_text("mine")
    data = bytearray(item.entry.weights.read_bytes())
    data[-1] ^= 1
    item.entry.weights.write_bytes(data)
    result = run("cache", "verify")
    assert result.returncode == 1
    assert "1 damaged" in result.stderr
    assert same_weights(vitadapter_zoo.load(NAME, checkpoint=source), NAME)  # made anew
    assert "intact" in run("cache", "verify").stdout
    assert "1 removed" in run("cache", "prune", "--all").stdout
    assert left_behind(zoo_home) == ["notes.txt"]
    assert "is no age" in failure("cache", "prune", "--older-than", "soon")
    assert "offline mode" in failure("download", "vit-t-deit-3x", "--offline")
    assert "name the models" in failure("download")


def test_cards_on_the_command_line(tmp_path: Path) -> None:
    assert "# vit-t-deit-3x" in run("card", "vit-t-deit-3x").stdout
    assert run("card", "--all", "--out", str(tmp_path)).returncode == 0
    assert len(list(tmp_path.iterdir())) == 11
