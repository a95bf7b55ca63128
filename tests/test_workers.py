import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import scenes
from click.testing import CliRunner

import vitadapter_zoo
from vitadapter_zoo import ImageError, MaskRCNN, Verification, ZooError
from vitadapter_zoo.cli import main
from vitadapter_zoo.dataset import Image
from vitadapter_zoo.records import PREDICTIONS, ImageResult, Run

PICTURES = 24
Watch = Callable[[Run, Sequence[Image]], None]


@pytest.fixture(scope="module")
def small(tiny: MaskRCNN) -> MaskRCNN:
    return scenes.small(tiny)


@pytest.fixture(scope="module")
def coco(small: MaskRCNN, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.write_coco(tmp_path_factory.mktemp("coco"), small, PICTURES)


@pytest.fixture(scope="module")
def folder(small: MaskRCNN, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vitadapter_zoo.save_pretrained(small, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(folder: Path, coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Verification:
    """What one process finds."""
    return vitadapter_zoo.verify(folder, coco, threads=1, run=tmp_path_factory.mktemp("run"))


def check_same(found: Verification, alone: Verification, run: Path) -> None:
    """The digits of one process, each image written once."""
    assert found.results == alone.results
    assert found.box == alone.box
    assert found.mask == alone.mask
    assert found.details["identity"] == alone.details["identity"]
    assert (run / PREDICTIONS).read_bytes().count(b"\n") == PICTURES


def after(count: int, act: Callable[[], object]) -> Watch:
    """Act once, when so many results are there."""

    def watch(run: Run, images: Sequence[Image]) -> None:
        if len(run.results) == count:
            act()

    return watch


def the_workers() -> list[BaseProcess]:
    return list(multiprocessing.active_children())


def signal_one(number: signal.Signals) -> None:
    pid = the_workers()[0].pid
    assert pid is not None
    os.kill(pid, number)


def test_two_processes_give_the_digits_of_one(
    folder: Path, coco: Path, alone: Verification, tmp_path: Path
) -> None:
    counts = []
    found = vitadapter_zoo.verify(
        folder, coco, workers=2, threads=1, run=tmp_path,
        watch=lambda run, images: counts.append(len(the_workers())),
    )  # fmt: skip
    assert max(counts) == 2
    check_same(found, alone, tmp_path)
    assert not the_workers()


def test_a_killed_worker_loses_no_image_and_none_is_counted_twice(
    folder: Path, coco: Path, alone: Verification, tmp_path: Path
) -> None:
    kill = after(6, lambda: signal_one(signal.SIGKILL))
    found = vitadapter_zoo.verify(
        folder, coco, workers=2, threads=1, run=tmp_path, watch=kill
    )
    check_same(found, alone, tmp_path)


def test_an_image_that_hangs_is_run_elsewhere(
    folder: Path, coco: Path, alone: Verification, tmp_path: Path
) -> None:
    stop = after(6, lambda: signal_one(signal.SIGSTOP))
    found = vitadapter_zoo.verify(
        folder, coco, workers=2, threads=1, run=tmp_path, watch=stop
    )
    check_same(found, alone, tmp_path)
    assert not the_workers()
