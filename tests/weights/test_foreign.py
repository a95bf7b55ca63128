"""Untrusted files through ``load`` and ``convert``: one error each, names shown safely."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import standins
import torch
from forked import failure, run
from helpers import left_behind

import vitadapter_zoo
from vitadapter_zoo import CheckpointError
from vitadapter_zoo.publishing.cards import markdown
from vitadapter_zoo.weights import checkpoint

NAME = "adapter-t-deit-3x"
BIAS = "roi_head.mask_head.upsample.bias"


@pytest.mark.parametrize("key", ["training", "classes"])
@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "{", "9" * 5000, '["\\u001b", 3]', "null", '""']
)
def test_metadata_of_safetensors_that_is_no_use_is_left_out(
    key: str, text: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2)}, path, {key: text})
    read = checkpoint.read(path, "it")
    assert (read.metadata, read.classes) == ({}, None)


@pytest.mark.parametrize("shards", [b"[" * 50_000, b"\xff\xfe", b"{}", b'{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none_is_one_error(shards: bytes, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(shards)
    with pytest.raises(CheckpointError, match="is not an index of sharded safetensors"):
        vitadapter_zoo.load(NAME, checkpoint=index)


def test_not_finite_weights_are_refused_at_load_and_accepted_where_asked_for(
    tmp_path: Path, zoo_home: Path
) -> None:
    state = standins.state_dict(NAME)
    state[BIAS][3] = float("nan")
    path, out = tmp_path / "nan.pth", tmp_path / "nan.safetensors"
    torch.save({"module." + name: value for name, value in state.items()}, path)
    with pytest.raises(CheckpointError, match=BIAS.replace(".", r"\.")):
        vitadapter_zoo.load(NAME, checkpoint=path)
    assert left_behind(zoo_home) == []
    command = ["convert", str(path), "--model", NAME, "--out", str(out)]
    assert "--allow-nonfinite" in failure(*command)
    done = run(*command, "--allow-nonfinite")
    assert (done.returncode, "prefixes removed: module." in done.stdout) == (0, True), done
    with pytest.raises(CheckpointError, match="NaN"):
        vitadapter_zoo.load(NAME, checkpoint=out)
    model = vitadapter_zoo.load(NAME, checkpoint=out, allow_nonfinite=True)
    assert model.state_dict()[BIAS][3].isnan()


def test_a_weight_too_large_for_half_precision_is_refused(tmp_path: Path) -> None:
    state = standins.state_dict(NAME)
    state[BIAS][3] = 1e6
    path = tmp_path / "large.safetensors"
    safetensors.torch.save_file(state, path)
    assert vitadapter_zoo.load(NAME, checkpoint=path, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match="too large for float16"):
        vitadapter_zoo.load(NAME, checkpoint=path, dtype=torch.float16)
    assert "too large for float16" in failure(
        "convert", str(path), "--model", NAME, "--dtype", "float16",
        "--out", str(tmp_path / "half.safetensors"),
    )  # fmt: skip


def test_file_names_are_shown_safely(tmp_path: Path) -> None:
    path = tmp_path / "evil\x1b[2J\n.pth"
    for content in (b"hello", b"\x80\x02cos\nsystem\n.", b"PK\x03\x04"):
        path.write_bytes(content)
        said = failure("convert", str(path), "--model", NAME, "--out", str(tmp_path / "a.pth"))
        assert r"evil\x1b[2J\n.pth" in said
        assert "\x1b" not in said
    assert "\x1b" not in failure("convert", "none\x1b[2J.pth", "--model", NAME)
    assert markdown("<b>|`x`\x1b[2J") == r"\<b\>\|\`x\`/x1b\[2J"


def test_paths_with_a_tilde_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "me"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("VITADAPTER_ZOO_HOME", "~/zoo")
    safetensors.torch.save_file(standins.state_dict(NAME), home / "a.safetensors")
    done = run("convert", "~/a.safetensors", "--model", NAME, "--format", "mmdet",
               "--out=~/b.pth", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done
    assert (home / "b.pth").is_file()
    assert run("cache", "path").stdout.strip() == str(home / "zoo")
    run("card", "--all", "--out", "~/cards", cwd=tmp_path)
    assert {path.stem for path in (home / "cards").iterdir()} == set(vitadapter_zoo.list_models())
    model: Any = vitadapter_zoo.load(NAME, pretrained=False)
    assert vitadapter_zoo.save_pretrained(model, "~/mine") == home / "mine"
    assert vitadapter_zoo.load("~/mine").row == model.row
    assert not (tmp_path / "~").exists()
