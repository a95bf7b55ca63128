"""The command line: `list` and `info`, shell completion, and commands that import no torch."""

import csv
import io
import json
import os
import shutil
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
    assert "COCO's 80" in text
    assert "7.9 s on 2 CPU cores" in text
    assert json.loads(run("info", "vit-t-deit-3x", "--json").stdout)["mask_ap"] == 37.0
    assert "did you mean vit-t-deit-3x" in failure("info", "vit-t-deit")
    words = run("info", "vit-s-deit-3x").stdout.split()
    assert "adapter-s-deit-3x is more accurate" in " ".join(words)


def test_every_row_has_advice() -> None:
    for name in vitadapter_zoo.list_models():
        assert "  advice " in run("info", name).stdout


def test_info_of_a_saved_model(folder: Path, tmp_path: Path) -> None:
    text = run("info", str(folder)).stdout
    assert text.startswith(f"{folder}, a saved adapter-n-emoji\n")
    assert "longest side 64, shortest 40" in text
    box_ap = vitadapter_zoo.get_row("adapter-n-emoji").box_ap
    assert str(box_ap) not in text  # the published figures are not this model's
    record = json.loads(run("info", str(folder), "--json").stdout)
    assert (record["base"], record["dtype"]) == ("adapter-n-emoji", "float32")
    assert record["box_ap"] is None
    assert len(record["classes"]) == 80
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    config = json.loads((own / "config.json").read_text())
    config["id2label"]["0"] = "a\x1b[2Jb"
    (own / "config.json").write_text(json.dumps(config))
    done = run("info", "own", cwd=tmp_path)
    assert "\x1b" not in done.stdout + done.stderr
    assert r"a\x1b[2Jb" in done.stdout + done.stderr
    assert "config.json" in failure("info", str(tmp_path))


def test_list_fits_80_columns_and_takes_patterns() -> None:
    lines = run("list").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    names = run("list", "--filter", "vit-t-*", "--filter", "adapter-l-*", "--exclude", "x*").stdout
    assert "vit-t-deit-3x" in names
    assert "adapter-l-augreg-3x" in names
    assert "adapter-t-deit-3x" not in names
    assert "no model fits 'a*' or 'b'" in failure(
        "list", "--filter", "a*", "--filter", "b", "--exclude", "*"
    )


@pytest.mark.parametrize("module", ["vitadapter_zoo", "vitadapter_zoo.cli"])
def test_python_m(module: str) -> None:
    command = [sys.executable, "-m", module, "list", "--csv"]
    assert "adapter-t-deit-1x" in subprocess.check_output(command, text=True)


def completed(words: str, shell: str) -> str:
    """Return the completions of the last word that the command offers to a shell."""
    environment = {
        **os.environ,
        "_VITADAPTER_ZOO_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": f"vitadapter-zoo {words}",
        # fish sends the word itself instead of its number
        "COMP_CWORD": words.split()[-1] if shell == "fish" else str(len(words.split())),
    }
    return subprocess.check_output([INSTALLED], env=environment, text=True)


@pytest.mark.parametrize(
    "command",
    [
        "info",
        "predict x.jpg --model",
        "verify",
        "score x.json --model",
        "train",
        "download vit-t-deit-3x",
        "convert x.pth --model",
        "card",
        "config",
        "compare",
    ],
)
def test_shells_complete_model_names(command: str) -> None:
    assert completed(f"{command} adapter-l-a", "bash") == "plain,adapter-l-augreg-3x\n"


def test_every_shell_gets_the_names_in_its_own_form() -> None:
    assert completed("info vit-t", "zsh") == "plain\nvit-t-deit-3x\n_\n"
    assert completed("info vit-t", "fish").startswith("plain")
    assert "vit-t-deit-3x" in completed("info vit-t", "fish")
    for shell in ("bash", "zsh", "fish"):
        assert f"_VITADAPTER_ZOO_COMPLETE={shell}_source vitadapter-zoo" in run("--help").stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--model", "vit-t-deit-3x", "--offline"], "offline mode"),
        (["--model", "adapter-t-deit-1x"], "127.0.0.1:9 cannot be reached"),
        (
            ["--model", "vit-t-deit-3x", "--checkpoint", "http://nowhere.invalid/x.pth"],
            "nowhere.invalid cannot be reached",
        ),
    ],
)
def test_without_a_network_a_command_fails_before_it_imports_torch(
    arguments: list[str], reason: str, tmp_path: Path
) -> None:
    """The error has to come within a second; importing torch takes longer."""
    main = "from vitadapter_zoo.cli import main; main()"
    code = f"import sys; sys.argv[1:] = {['predict', 'x.jpg', *arguments]!r}; {main}"
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code],
        capture_output=True,
        text=True,
        env=environment,
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 2
    assert not [line for line in lines if line.rpartition("|")[2].strip() == "torch"]
    (said,) = [line for line in lines if not line.startswith("import time:")]
    assert reason in said


LIST = "from vitadapter_zoo.cli import main; main(['list'], standalone_mode=False)"


@pytest.mark.parametrize("code", ["import vitadapter_zoo", LIST])
def test_neither_import_nor_list_imports_torch(code: str) -> None:
    command = [sys.executable, "-X", "importtime", "-c", code]
    imported = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    names = {line.rpartition("|")[2].strip() for line in imported.splitlines()}
    assert "vitadapter_zoo.catalog" in names
    assert not names & {"torch", "torchvision", "numpy", "cv2", "requests", "huggingface_hub"}
