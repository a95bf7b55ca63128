"""Processes that download or convert at the same time, or are killed at any moment."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import Server, serving
from forked import Worker, workers
from helpers import left_behind, same_weights

import vitadapter_zoo
from vitadapter_zoo.weights import cache

NAME = "adapter-t-deit-3x"


LOAD = """
import sys, helpers, vitadapter_zoo
model = vitadapter_zoo.load("adapter-t-deit-3x", checkpoint=sys.argv[1])
print(helpers.same_weights(model, "adapter-t-deit-3x"))
"""


def test_eight_processes_download_once(published_file: Callable[[str], Path]) -> None:
    with serving(Server(published_file(NAME).read_bytes())) as server:
        running = [workers().start(LOAD, server.url) for _ in range(8)]
        results = [worker.wait() for worker in running]
        assert [result.returncode for result in results] == [0] * 8, results
        assert {result.stdout for result in results} == {"True\n"}
        assert server.asked == [None]
        assert same_weights(vitadapter_zoo.load(NAME, checkpoint=server.url), NAME)
    assert server.asked == [None]


OBTAIN = """
import sys
from vitadapter_zoo import get_row
from vitadapter_zoo.weights import resolve
from vitadapter_zoo.weights.progress import silent
from vitadapter_zoo.weights.source import parse
row = get_row("adapter-t-deit-3x")
resolve.obtain(row, parse(sys.argv[1]), lambda name: silent)
print("done")
"""


def complete_is_right(url_or_path: str) -> None:
    """What counts as complete is complete, and a source without a published hash has its first."""
    for item in cache.listing():
        if item.provenance:
            assert item.entry.is_intact(item.provenance)
            assert item.entry.known() or not url_or_path.startswith("http")


def next_start_is_right(url_or_path: str, home: Path) -> None:
    """The next start ends with the right weights and nothing else."""
    assert same_weights(vitadapter_zoo.load(NAME, checkpoint=url_or_path), NAME)
    complete_is_right(url_or_path)
    names = left_behind(home)
    assert not [name for name in names if "download" in name or "tmp" in name]


def kill_rounds(rounds: int, home: Path, url_or_path: str) -> int:
    """Kill a downloading or converting process at random moments; count those that were hit."""
    rng = random.Random(0)
    hit = 0
    began = time.monotonic()
    assert workers().run(OBTAIN, url_or_path).stdout
    whole = time.monotonic() - began
    cache.prune(everything=True)
    for round_ in range(rounds):
        worker = workers().start(OBTAIN, url_or_path)
        time.sleep(rng.uniform(0, whole))
        hit += killed(worker)
        complete_is_right(url_or_path)
        if round_ % 3 == 2:  # let one finish, and begin anew
            next_start_is_right(url_or_path, home)
            cache.prune(everything=True)
    next_start_is_right(url_or_path, home)
    return hit


def killed(worker: Worker) -> bool:
    """Kill it; whether it had not ended by then."""
    os.kill(worker.pid, signal.SIGKILL)
    return worker.wait().stdout == ""


@pytest.mark.parametrize("kind", ["download", "convert"])
@pytest.mark.parametrize("rounds", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_processes_leave_nothing_wrong(
    published_file: Callable[[str], Path], zoo_home: Path, rounds: int, kind: str
) -> None:
    with serving(Server(published_file(NAME).read_bytes())) as server:
        source = server.url if kind == "download" else str(published_file(NAME))
        hit = kill_rounds(rounds, zoo_home, source)
    resumed = sum(asked is not None for asked in server.asked)
    print(f"{kind}: {rounds} kills, {hit} before the end; {resumed} requests went on by Range")
    assert hit


DIES_AT = """
import os, signal, sys

STEPS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
left = int(sys.argv[2])

def die(event, arguments):
    global left
    wanted = event in STEPS or event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if wanted and "zoo-" in str(arguments[0]):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(die)
"""


@pytest.mark.parametrize("kind", ["download", "convert"])
@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_killed_at_any_disk_operation_leaves_nothing_wrong(
    published_file: Callable[[str], Path], zoo_home: Path, kind: str, stride: int
) -> None:
    with serving(Server(published_file(NAME).read_bytes())) as server:
        source = server.url if kind == "download" else str(published_file(NAME))
        for steps in range(stride // 2, 200, stride):
            done = workers().run(DIES_AT + OBTAIN, source, str(steps))
            complete_is_right(source)
            if done.stdout:
                break
            assert done.returncode == -signal.SIGKILL, done.stderr
            next_start_is_right(source, zoo_home)
            shutil.rmtree(zoo_home)
    print(f"{kind}: killed at every step, or {stride}th step, of {steps}")
    assert steps >= 10


def test_the_next_load_removes_what_a_killed_process_left(
    published_file: Callable[[str], Path], zoo_home: Path
) -> None:
    with serving(Server(published_file(NAME).read_bytes())) as server:
        vitadapter_zoo.load(NAME, checkpoint=server.url)
        (weights,) = zoo_home.rglob("*.safetensors")
        weights.with_suffix(".download.part.json").write_text("{}")
        vitadapter_zoo.load(NAME, checkpoint=server.url)
    assert not [name for name in left_behind(zoo_home) if "download" in name]
