"""Run directories: killed, damaged and foreign runs."""

import copy
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import COMMAND, run, workers
from verification import PICTURES, command, figures

import vitadapter_zoo
from vitadapter_zoo import (
    MaskRCNN,
    Verification,
    ZooError,
)
from vitadapter_zoo.evaluation.run import PREDICTIONS, ImageResult, open_run
from vitadapter_zoo.evaluation.scoring import FIGURES, KINDS


def test_a_killed_run_ends_with_the_same_digits(
    saved: Path, coco: Path, undisturbed: Verification, tmp_path: Path
) -> None:
    killed = kill_rounds(saved, coco, undisturbed, tmp_path, rounds=3)
    assert killed > 0


@pytest.mark.slow
def test_fifty_killed_runs_end_with_the_same_digits(
    saved: Path, coco: Path, undisturbed: Verification, tmp_path: Path
) -> None:
    assert kill_rounds(saved, coco, undisturbed, tmp_path, rounds=50) > 25


def kill_rounds(
    saved: Path, coco: Path, undisturbed: Verification, tmp_path: Path, rounds: int
) -> int:
    """Kill a run once at a random moment of its images, let it end; how many were killed."""
    rng = random.Random(1)
    killed = 0
    for round_ in range(rounds):
        directory = tmp_path / f"run-{round_}"
        arguments = [
            *("verify", str(saved), "--coco", str(coco), "--run", str(directory), "--json")
        ]
        process = workers().start(COMMAND, *arguments)
        while process.is_running() and not (directory / PREDICTIONS).exists():
            time.sleep(0.01)
        time.sleep(rng.random() * 1.5)
        if process.is_running():
            os.kill(process.pid, rng.choice([signal.SIGKILL, signal.SIGINT]))
            killed += 1
        # Before and after the command's own code Python dies by SIGINT: 130 too, to shells.
        assert process.wait().returncode in (3, -signal.SIGKILL, 130, -signal.SIGINT)
        ended = run(*arguments)
        assert ended.returncode == 3, ended.stderr
        record = json.loads(ended.stdout)
        again = [record[kind]["figures"][name] for kind in KINDS for name in FIGURES]
        assert again == figures(undisturbed)
        assert record["images"]["evaluated"] == PICTURES
        shutil.rmtree(directory)
    return killed


def test_a_torn_record_is_done_again(tmp_path: Path) -> None:
    results = [
        ImageResult(key, (4, 5), [[0.0, 1.0, 2.0, 3.5]], [0.25], [7], ["abc"], "00")
        for key in range(3)
    ]
    with open_run(tmp_path, {"a": 1}) as run:
        for result in results:
            run.append(result)
    path = tmp_path / PREDICTIONS
    whole = path.read_bytes()
    last = whole[:-1].rindex(b"\n") + 1
    for end in range(last, len(whole)):
        path.write_bytes(whole[:end])
        with open_run(tmp_path, {"a": 1}) as run:
            assert sorted(run.results) == [0, 1]
            run.append(results[2])
        assert path.read_bytes() == whole
    for place in (3, last + 12):  # a damaged record, wherever it stands
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with open_run(tmp_path, {"a": 1}) as run:
            assert len(run.results) == 2
    with open_run(tmp_path, {"a": 1}) as run:
        assert run.results == {key: results[int(key)] for key in run.results}


def test_results_of_another_run_are_not_mixed(
    detector: MaskRCNN,
    coco: Path,
    undisturbed: Verification,
    changed: Callable[[Callable[[dict[str, Any]], None]], Path],
) -> None:
    run = undisturbed.details["run"]
    other = copy.deepcopy(detector)
    with torch.no_grad():
        next(other.rpn_head.parameters()).add_(1e-3)
    with pytest.raises(ZooError, match=r"weights_sha256.*another run directory"):
        vitadapter_zoo.verify(other, coco, run=run)

    def shrink(content: dict[str, Any]) -> None:
        content["annotations"].pop()

    with pytest.raises(ZooError, match="annotations_sha256"):
        vitadapter_zoo.verify(detector, changed(shrink), run=run)
    with pytest.raises(ZooError, match="precision: 'float32' then, 'bfloat16' now"):
        vitadapter_zoo.verify(copy.deepcopy(detector).to(torch.bfloat16), coco, run=run)
    with pytest.raises(ValueError, match="leave checkpoint, device and dtype out"):
        vitadapter_zoo.verify(detector, coco, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"set model\.allow_tf32"):
        vitadapter_zoo.verify(detector, coco, allow_tf32=True)
    found = command("verify", "adapter-n-emoji", "--coco", coco, "--device", "cpu", "--tf32")
    assert found.exit_code == 2
    assert "--tf32 needs --device cuda and --dtype float32" in found.stderr


def test_a_full_disk_keeps_what_is_finished(
    saved: Path, coco: Path, undisturbed: Verification, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    whole = (Path(undisturbed.details["run"]) / PREDICTIONS).stat().st_size
    limit = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({whole // 2}, {whole}))\n"
    arguments = ["verify", str(saved), "--coco", str(coco), "--run", str(directory)]
    limited = workers().run(limit + COMMAND, *arguments)
    assert limited.returncode == 2
    assert "cannot write to the run directory" in limited.stderr
    assert "Traceback" not in limited.stderr
    kept = (directory / PREDICTIONS).read_bytes()
    assert kept.endswith(b"\n")
    assert 0 < kept.count(b"\n") < PICTURES
    again = command("verify", saved, "--coco", coco, "--run", directory, "--json")
    record = json.loads(again.stdout)
    assert record["images_before"] == kept.count(b"\n")
    assert record["mask"]["figures"] == undisturbed.mask.figures


def test_no_process_of_another_user_is_waited_for(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", {}):
        code = (
            "import sys; from pathlib import Path\n"
            "from vitadapter_zoo.evaluation.run import open_run\n"
            "with open_run(Path(sys.argv[1]), {}): pass"
        )
        other = workers().run(code, str(tmp_path / "run"))
    assert "in use by another process" in other.stderr
