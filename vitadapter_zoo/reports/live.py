"""The progress line of an evaluation on stderr, if that is a terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from vitadapter_zoo.evaluation.dataset import Dataset, Image
from vitadapter_zoo.evaluation.run import ImageResult, Run
from vitadapter_zoo.evaluation.scoring import KINDS, NOTHING, Annotations

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SCORING_SHARE = 50  # scoring takes at most 1/50 of the time

Watch = Callable[[Run, Sequence[Image]], None]


@contextlib.contextmanager
def evaluation(
    data: Dataset, shown: bool = True, max_minutes: float | None = None
) -> Iterator[Watch | None]:
    """Show finished images, images per second, remaining time and the AP so far.

    Args:
        data: the data set, for the running AP.
        shown: False shows nothing; nothing is shown either if stderr is not a terminal.
        max_minutes: after which the run ends.

    Yields:
        The argument ``watch`` of ``verify``; None if nothing is shown.
    """
    if not (shown and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    limit = "" if max_minutes is None else f", for {max_minutes:g} min at most"
    progress = Progress(
        TextColumn(f"images{limit}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[ap]}"),
        console=Console(stderr=True, highlight=False),
        speed_estimate_period=300,  # seconds; on a CPU an image may take ten
    )
    with ThreadPoolExecutor(1, "running-ap") as scorer, contextlib.ExitStack() as ending:
        ending.callback(progress.stop)
        yield _Line(progress, RunningAP(data, scorer)).show


class _Line:
    """The progress line; it starts with the first image, after the progress bars of downloads."""

    def __init__(self, progress: Progress, running: RunningAP) -> None:
        self._progress = progress
        self._running = running
        self._task: TaskID | None = None
        self._before = 0
        self._calls = 0
        self._began = time.monotonic()

    def show(self, run: Run, images: Sequence[Image]) -> None:
        """Count an image and update the line."""
        self._calls += 1
        if self._task is None:
            self._before = sum(image.image_id in run.results for image in images) - 1
            self._began = time.monotonic()
            self._progress.start()
            if self._before:
                self._progress.console.print(
                    f"{self._before:,} of {len(images):,} images were evaluated in an earlier call"
                )
            self._task = self._progress.add_task(
                "", total=len(images), completed=self._before, speed="", ap=""
            )
        passed = time.monotonic() - self._began
        speed = f"{(self._calls - 1) / passed:.2f} images/s" if self._calls > 1 else ""
        self._progress.update(
            self._task,
            completed=min(len(images), self._before + self._calls),
            speed=speed,
            ap=self._running.text(run, images),
        )


class RunningAP:
    """The AP of the images so far, computed in another thread for a small share of the time.

    Args:
        data: the data set.
        scorer: runs the scoring, with one thread.
    """

    def __init__(self, data: Dataset, scorer: ThreadPoolExecutor) -> None:
        self._data = data
        self._scorer = scorer
        self._annotations: Annotations | None = None
        self._pending: Future[tuple[str, float]] | None = None
        self._text = ""
        self._not_before = 0.0

    def text(self, run: Run, images: Sequence[Image]) -> str:
        """Return the last known AP, and start the next scoring if it is due."""
        if self._pending is not None and self._pending.done():
            self._text, cost = self._pending.result()
            self._pending = None
            self._not_before = time.monotonic() + SCORING_SHARE * cost
        if self._pending is None and time.monotonic() >= self._not_before:
            results = [
                run.results[image.image_id] for image in images if image.image_id in run.results
            ]
            self._pending = self._scorer.submit(self._score, results)
        return self._text

    def _score(self, results: Sequence[ImageResult]) -> tuple[str, float]:
        began = time.monotonic()
        if self._annotations is None:
            self._annotations = Annotations(self._data)
        good = self._annotations.tabulate([one for one in results if not one.skipped])
        values = []
        for kind in KINDS:
            ap = self._annotations.score(good, kind).ap
            values.append(f"{kind} {'-' if ap == NOTHING else f'{100 * ap:.1f}'}")
        return f"AP of {len(good.images):,}: {', '.join(values)}", time.monotonic() - began
