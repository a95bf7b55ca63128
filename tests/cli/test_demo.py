"""``vitadapter-zoo demo`` on a machine without network, and the bar for bfloat16."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import failure
from helpers import left_behind
from PIL import Image

import vitadapter_zoo
from vitadapter_zoo import get_row
from vitadapter_zoo.cli.demo import PICTURES
from vitadapter_zoo.evaluation.dataset import row_dataset

ROW = get_row("adapter-n-emoji")
# Ends at the first use of the network, so that no handler of errors can hide it.
WITHOUT_NETWORK = """
import os, socket
def refuse(*arguments, **options):
    os.write(2, b"the network was used")
    os._exit(77)
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from vitadapter_zoo.cli import main
main(prog_name="vitadapter-zoo")
"""


def without_network(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_NETWORK, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_demo_confirms_without_network_and_ends_with_its_files(
    tmp_path: Path, zoo_home: Path
) -> None:
    done = without_network("demo", "--out", "shown", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not zoo_home.exists() or left_behind(zoo_home) == []
    for text in ("$ vitadapter-zoo predict", "$ vitadapter-zoo verify", ROW.name, "confirmed"):
        assert text in done.stdout
    report = json.loads((tmp_path / "shown" / "report" / "report.json").read_text())
    assert (report["verdict"], report["images"]["evaluated"]) == (
        "confirmed",
        len(row_dataset(ROW).images),
    )

    paths = [tmp_path / line.strip() for line in done.stdout.splitlines()[-4:]]
    assert paths[-1].name == "report.html"
    assert "confirmed" in paths[-1].read_text()
    originals = {image.path.name: image.path for image in row_dataset(ROW).images}
    for path, name in zip(paths[:-1], PICTURES, strict=True):
        drawn, original = Image.open(path), Image.open(originals[name])
        assert drawn.size == original.size
        assert drawn.tobytes() != original.tobytes()


def test_the_network_is_cut_off_in_these_tests(tmp_path: Path) -> None:
    done = without_network("download", "adapter-t-deit-3x", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (77, "the network was used")


def test_demo_names_a_folder_that_it_cannot_write_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    error = failure("demo", "--out", str(tmp_path / "file"))
    assert str(tmp_path / "file") in error
    assert len(error.splitlines()) == 1


@pytest.mark.slow
def test_bfloat16_stays_within_half_a_point_of_the_row() -> None:
    """The row's figures were measured in float32; `verify` confirms them to 0.1."""
    found = vitadapter_zoo.verify(ROW.name, dtype=torch.bfloat16, progress=False)
    for comparison in found.comparisons:
        assert comparison.difference is not None
        assert abs(comparison.difference) <= 0.5
