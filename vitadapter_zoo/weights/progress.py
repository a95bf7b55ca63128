"""Progress bars for downloads: one line per file on stderr, if that is a terminal."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TypeAlias

# Called with the bytes so far and in total (None if unknown).
Report: TypeAlias = Callable[[int, int | None], None]


def silent(done: int, total: int | None) -> None:
    """Show no progress."""


@contextlib.contextmanager
def bars(shown: bool = True) -> Iterator[Callable[[str], Report]]:
    """Show progress bars while the block runs; yields a function that adds a bar for a file name.

    Args:
        shown: False shows nothing. Without a terminal on stderr nothing is shown either.
    """
    if not (shown and sys.stderr.isatty()):
        yield lambda name: silent
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )

    def line(name: str) -> Report:
        task = progress.add_task(name, total=None)

        def report(done: int, total: int | None) -> None:
            progress.update(task, completed=done, total=total)

        return report

    with progress:
        yield line
