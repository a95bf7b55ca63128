import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from forked import failure, run

import vitadapter_zoo

INSTALLED = str(Path(sys.executable).parent / "vitadapter-zoo")


def test_version_and_help_have_examples() -> None:
    version = f"vitadapter-zoo, version {vitadapter_zoo.__version__}\n"
    assert subprocess.check_output([INSTALLED, "--version"], text=True) == version
    assert run("--version").stdout == version
    for command in ([], ["list"], ["info"], ["predict"]):
        assert "Example" in run(*command, "--help").stdout


def test_list_shows_every_row_with_its_gains() -> None:
    table = run("list").stdout
    for name in vitadapter_zoo.list_models():
        assert name in table
    assert "52.1 +3.8" in table
    assert "vit-" not in run("list", "--filter", "adapter-*").stdout.replace("ViT-", "")


def test_list_as_json_and_csv() -> None:
    records = json.loads(run("list", "--json").stdout)
    assert [record["name"] for record in records] == vitadapter_zoo.list_models()
    assert records[0]["sha256"].startswith("09b2e00c")
    rows = list(csv.DictReader(io.StringIO(run("list", "--csv").stdout)))
    assert [row["name"] for row in rows] == vitadapter_zoo.list_models()
    assert json.loads(rows[0]["input_size"]) == [1333, 800]
    assert "choose one" in failure("list", "--json", "--csv")
    assert "no model fits 'x*'" in failure("list", "--filter", "x*")


def test_info() -> None:
    text = run("info", "adapter-b-uniperceiver-3x").stdout
    assert "51.2" in text
    assert "Uni-Perceiver-B" in text
    assert json.loads(run("info", "vit-t-deit-3x", "--json").stdout)["mask_ap"] == 37.0
    assert "did you mean vit-t-deit-3x" in failure("info", "vit-t-deit")


LIST = "from vitadapter_zoo.cli import main; main(['list'], standalone_mode=False)"


@pytest.mark.parametrize("code", ["import vitadapter_zoo", LIST])
def test_neither_import_nor_list_imports_torch(code: str) -> None:
    command = [sys.executable, "-X", "importtime", "-c", code]
    imported = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    names = {line.rpartition("|")[2].strip() for line in imported.splitlines()}
    assert "vitadapter_zoo.catalog" in names
    assert not names & {"torch", "torchvision", "numpy", "cv2", "requests", "huggingface_hub"}
