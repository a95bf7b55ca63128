"""Training runs that are interrupted, killed or robbed of a file, and continued."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest
import shapes
from forked import COMMAND, workers
from quick_training import NANO, OPTIONS, QUICK, interrupt_when_saved, same

from vitadapter_zoo import load
from vitadapter_zoo.training.run import train
from vitadapter_zoo.training.state import read_log, read_state

pytestmark = pytest.mark.usefixtures("one_thread")


def test_three_parts_give_the_weights_of_one(data: Path, tmp_path: Path) -> None:
    """With everything that has a state: average, accumulation, augmentation, stochastic draws."""
    options = {**QUICK, "epochs": 8, "ema": 0.9, "accumulate": 2, "augment": "multi-scale"}
    whole = train(NANO, data, tmp_path / "whole", **options)
    assert whole.step == 8
    out = tmp_path / "parts"
    options["save_minutes"] = 1e-6  # after every step
    steps = []
    for number in (signal.SIGINT, signal.SIGTERM):
        thread = interrupt_when_saved(out, 2, number)
        with pytest.raises(KeyboardInterrupt):
            train(NANO, data, out, resume=True, **options)
        thread.join()
        state = read_state(out)
        assert state
        steps.append(state["step"])
    assert 0 < steps[0] < steps[1] < 8
    result = train(NANO, data, out, resume=True, **options)
    assert result.step == 8
    assert same(whole.last, result.last)
    logged = [entry["step"] for entry in read_log(out)]
    assert logged == sorted(logged)
    assert logged[-1] == 8


def test_ctrl_c_reaches_all_processes(data: Path, tmp_path: Path) -> None:
    """As a terminal sends it: to those that prepare images too."""
    out = tmp_path / "run"
    arguments = ("--data", str(data), "--out", str(out), *OPTIONS, "--epochs", "500")
    process = workers().start(
        COMMAND, "train", NANO, *arguments, "--workers", "2",
        environment={"OMP_NUM_THREADS": "1"}, session=True,
    )  # fmt: skip
    while not (out / "log.jsonl").exists() and process.is_running():
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    done = process.wait()
    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith("interrupted\n")
    assert "Traceback" not in done.stderr
    state = read_state(out)
    assert state
    assert state["step"] >= 20


def test_a_file_that_vanishes_ends_the_run_with_its_name(tmp_path: Path) -> None:
    root, out = shapes.roboflow(tmp_path / "data"), tmp_path / "run"
    options = ["--epochs", "500", "--workers", "1", "--lr", "1e-4"]
    worker = workers().start(
        COMMAND, "train", NANO, "--data", str(root), "--out", str(out), *OPTIONS, *options,
        environment={"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while not (out / "log.jsonl").exists():
        time.sleep(0.1)
    (root / "train" / "001.png").unlink()
    done = worker.wait()
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert "cannot read the image" in last
    assert "001.png" in last
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_twenty_kills_change_nothing(data: Path, tmp_path: Path) -> None:
    options = [*OPTIONS, "--epochs", "30", "--ema", "0.9", "--eval-every", "3"]
    environment = {"OMP_NUM_THREADS": "1"}
    arguments = ("train", NANO, "--data", str(data), *options, "--out")
    began = time.monotonic()
    whole = workers().run(COMMAND, *arguments, str(tmp_path / "whole"), environment=environment)
    assert whole.returncode == 0, whole.stderr
    seconds = time.monotonic() - began
    generator, kills, parts = random.Random(0), 0, 0
    continued = set()  # steps at which a killed run went on
    while kills < 20:
        parts += 1
        out, status = tmp_path / f"parts-{parts}", 1
        while status:
            worker = workers().start(
                COMMAND, *arguments, str(out), "--resume", environment=environment
            )
            if kills < 20:
                time.sleep(generator.uniform(0.1, 0.6) * seconds)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)
            done = worker.wait()
            status = done.returncode
            assert status in (0, -signal.SIGKILL), done.stderr
            kills += status != 0
            state = read_state(out)  # whole or absent, whatever moment it was
            if status and state is not None:
                continued.add((parts, state["step"]))
            for name in ("last", "best"):
                if (out / name).exists():
                    load(out / name)
        assert same(tmp_path / "whole" / "last", out / "last")
        assert same(tmp_path / "whole" / "best", out / "best")
    assert len(continued) >= 5, continued  # the kills came at different places of the run
