"""The live line of `verify`: images evaluated so far, and their AP."""

import contextlib
import os
import pty
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from report_scenes import Scene

from vitadapter_zoo.evaluation.run import Run
from vitadapter_zoo.evaluation.scoring import Annotations
from vitadapter_zoo.reports import live


def watched(scene: Scene, directory: Path, shown: bool) -> str:
    """What a terminal shows when the second and third image are finished."""
    leader, follower = pty.openpty()
    first, *others = scene.results
    run = Run(directory)
    directory.mkdir()
    run.append(first)
    with os.fdopen(follower, "w") as terminal, contextlib.redirect_stderr(terminal):
        with live.evaluation(scene.data, shown) as watch:
            assert (watch is not None) == shown
            for result in others:
                run.append(result)
                if watch is not None:
                    watch(run, scene.data.images)
                    time.sleep(1)  # until the AP so far is known
        output = ""
        if shown:
            output = os.read(leader, 100_000).decode()
    os.close(leader)
    return output


def test_the_line_counts_images_and_says_what_was_there_already(
    scene: Scene, tmp_path: Path
) -> None:
    output = watched(scene, tmp_path / "run", True)
    assert "1 of 3 images were evaluated in an earlier call" in output
    assert "3/3" in output
    assert re.search(r"AP of 2: box \d+\.\d, mask \d+\.\d", output)
    assert watched(scene, tmp_path / "quiet", False) == ""
    with live.evaluation(scene.data) as watch:
        assert watch is None  # pytest's stderr is no terminal


def test_the_running_ap_is_scored_seldom(scene: Scene) -> None:
    run = Run(Path(), {result.image_id: result for result in scene.results[:2]})
    annotations = Annotations(scene.data)
    expected = annotations.score(annotations.tabulate(scene.results[:2]), "mask").ap
    with ThreadPoolExecutor(1) as scorer:
        running = live.RunningAP(scene.data, scorer)
        assert running.text(run, scene.data.images) == ""
        scorer.submit(int).result()  # after the scoring
        text = running.text(run, scene.data.images)
        assert text.startswith("AP of 2: box ")
        assert text.endswith(f"mask {100 * expected:.1f}")
        run.results[scene.results[2].image_id] = scene.results[2]
        for _ in range(4):
            assert running.text(run, scene.data.images) == text
            scorer.submit(int).result()
