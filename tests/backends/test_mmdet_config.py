"""Without a working mmdet: the configuration is printed, and everything else is one error."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import standins

import vitadapter_zoo
from vitadapter_zoo import BackendError, get_row
from vitadapter_zoo.backends.mmdet_config import as_python, mmdet_config
from vitadapter_zoo.catalog import PUBLISHED

COMMAND = str(Path(sys.executable).parent / "vitadapter-zoo")


def printed(name: str) -> dict[str, Any]:
    """The settings that the command prints, read as the Python file that they are."""
    text = subprocess.run([COMMAND, "config", name], capture_output=True, text=True, check=True)
    assignments = [node for node in ast.parse(text.stdout).body if isinstance(node, ast.Assign)]
    return {str(node.targets[0].id): ast.literal_eval(node.value) for node in assignments}  # type: ignore[attr-defined]


def test_command_prints_the_whole_configuration() -> None:
    found = printed("adapter-l-augreg-3x")
    assert found == mmdet_config(get_row("adapter-l-augreg-3x"))
    assert found["optimizer"]["paramwise_cfg"] == {"num_layers": 24, "layer_decay_rate": 0.8}
    test = found["data"]["test"]["pipeline"][1]
    assert test["img_scale"] == (1333, 800)
    assert test["transforms"][2]["mean"] == (127.5, 127.5, 127.5)
    assert found["model"]["backbone"]["pretrained"].endswith(".pth")
    unknown = subprocess.run([COMMAND, "config", "vit-x"], capture_output=True, text=True)
    assert unknown.returncode == 2
    assert "unknown model 'vit-x'" in unknown.stderr


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.name)
def test_recipes_match_the_original(row: vitadapter_zoo.Row) -> None:
    config = mmdet_config(row)
    short = row.name == "adapter-t-deit-1x"
    assert config["runner"]["max_epochs"] == (12 if short else 36)
    assert config["lr_config"]["step"] == ([8, 11] if short else [27, 33])
    assert config["optimizer"]["lr"] == (2e-4 if short else 1e-4)
    steps = [step["type"] for step in config["data"]["train"]["pipeline"]]
    assert ("AutoAugment" in steps) is not short
    decayed = {
        "adapter-b-uniperceiver-3x": 0.65,
        "vit-l-augreg-3x": 0.80,
        "adapter-l-augreg-3x": 0.80,
        "adapter-s-dinov2-3x": 0.70,
        "adapter-b-dinov2-3x": 0.70,
        "adapter-l-dinov2-3x": 0.80,
    }
    assert ("constructor" in config["optimizer"]) is (row.name in decayed)
    rate = config["optimizer"]["paramwise_cfg"].get("layer_decay_rate")
    assert rate == decayed.get(row.name)
    assert config["model"]["backbone"].get("layer_scale", True) is not short
    assert ast.parse(as_python(config))


def test_dinov2_trunk_is_configured_as_in_the_original() -> None:
    for name in ("adapter-s-dinov2-3x", "adapter-l-dinov2-3x"):
        backbone = mmdet_config(get_row(name))["model"]["backbone"]
        assert (backbone["pretrain_size"], backbone["img_size"]) == (592, 592)
        assert backbone["patch_size"] == 16
        assert backbone["pretrained"] == get_row(name).pretraining_url
    assert backbone["drop_path_rate"] == 0.4
    assert backbone["window_size"] == [14, 14, 14, 14, 14, None] * 4


def test_other_classes_reach_the_heads_and_the_data() -> None:
    config = mmdet_config(get_row("vit-t-deit-3x"), ("cat", "dog"))
    heads = config["model"]["roi_head"]
    assert heads["bbox_head"]["num_classes"] == heads["mask_head"]["num_classes"] == 2
    assert config["data"]["val"]["classes"] == ("cat", "dog")


def test_a_broken_mmdet_does_not_stop_the_configuration(tmp_path: Path) -> None:
    for package in ("mmdet", "mmcv"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise ImportError('undefined symbol')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [COMMAND, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    found = run("config", "vit-t-deit-3x")
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout == as_python(mmdet_config(get_row("vit-t-deit-3x")))
    refused = run("compare", "vit-t-deit-3x", "--images", str(standins.PHOTO))
    assert refused.returncode == 2
    assert "undefined symbol" in refused.stderr


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'native' and 'mmdet'"):
        vitadapter_zoo.load("vit-t-deit-3x", backend="mmdet3")  # type: ignore[call-overload]


def test_missing_mmdet_is_one_error_with_advice() -> None:
    with pytest.raises(BackendError, match="make mmdet-env"):
        vitadapter_zoo.load("vit-t-deit-3x", backend="mmdet")
    command = [COMMAND, "compare", "vit-t-deit-3x", "--images", str(standins.PHOTO)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "No module named 'mmcv'" in result.stderr
    assert "Traceback" not in result.stderr
