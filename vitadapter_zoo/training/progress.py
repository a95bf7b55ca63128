"""Progress output of a run: a live line or plain lines, ``log.jsonl`` and TensorBoard files."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vitadapter_zoo.training.state import append_log

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from torch.utils.tensorboard import SummaryWriter

PLAIN_SECONDS = 30  # between two lines where there is no terminal


class Window:
    """Figures of the steps since the last look, kept on the device: looking waits for it."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._rows: list[Tensor] = []

    def add(self, figures: dict[str, Tensor]) -> None:
        """Keep the figures of one forward pass, scalars."""
        self._names = tuple(figures)
        self._rows.append(torch.stack([value.detach().float() for value in figures.values()]))

    def means(self) -> dict[str, float]:
        """The mean of each figure since the last call; NaN or infinity if any one was."""
        if not self._rows:
            return {}
        means = torch.stack(self._rows).mean(0).tolist()
        self._rows.clear()
        return dict(zip(self._names, means, strict=True))


class Reporter:
    """Tells how a run goes; of several processes only the main one has it.

    Args:
        directory: of the run.
        steps: optimizer steps of the whole run.
        step: where it continues.
        tensorboard: write TensorBoard files into ``directory/tensorboard``.
        shown: False shows nothing on the terminal.
    """

    def __init__(
        self, directory: Path, steps: int, step: int, *, tensorboard: bool, shown: bool
    ) -> None:
        self._directory = directory
        self._steps = steps
        self._shown = shown
        self._ap = ""
        self._told = time.monotonic()
        self._writer = _writer(directory, step) if tensorboard else None
        self._live: tuple[Progress, TaskID] | None = None
        if shown and sys.stderr.isatty():
            self._live = _live(steps, step)

    def say(self, line: str) -> None:
        """Show one line."""
        if self._live:
            # Class names are foreign text, not rich's markup.
            self._live[0].console.print(line, markup=False)
        elif self._shown:
            print(line, file=sys.stderr, flush=True)

    def progress(self, entry: dict[str, Any]) -> None:
        """Log the means of some steps."""
        self._record(entry)
        losses = " ".join(
            f"{name.removeprefix('loss_')} {value:.3f}"
            for name, value in entry.items()
            if name.startswith("loss")
        )
        memory = f", {entry['memory_gb']:.1f} GB" if "memory_gb" in entry else ""
        line = f"{losses}, lr {entry['lr']:.2e}, {entry['images_per_second']:.1f} img/s{memory}"
        if self._live:
            live, task = self._live
            live.update(task, completed=entry["step"], figures=line, ap=self._ap)
        elif self._shown and time.monotonic() - self._told > PLAIN_SECONDS:
            self._told = time.monotonic()
            self.say(f"step {entry['step']}/{self._steps}, epoch {entry['epoch']}: {line}")

    def evaluated(self, entry: dict[str, Any]) -> None:
        """Log an evaluation."""
        self._record(entry)
        self._ap = f"AP {entry['box_ap']:.1f} / {entry['mask_ap']:.1f}"
        self.say(
            f"epoch {entry['epoch']}, step {entry['step']}: box AP {entry['box_ap']:.1f}, "
            f"mask AP {entry['mask_ap']:.1f}"
        )

    def close(self) -> None:
        """End the live line and the files."""
        if self._live:
            self._live[0].stop()
        if self._writer is not None:
            self._writer.close()

    def _record(self, entry: dict[str, Any]) -> None:
        append_log(self._directory, entry)
        if self._writer is not None:
            for name, value in entry.items():
                if name not in ("step", "epoch"):
                    self._writer.add_scalar(name, value, entry["step"])


def _writer(directory: Path, step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    writer: SummaryWriter = SummaryWriter(directory / "tensorboard", purge_step=step)
    return writer


def _live(steps: int, step: int) -> tuple[Progress, TaskID]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    progress = Progress(
        BarColumn(20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        TextColumn("{task.fields[ap]}"),
        console=Console(stderr=True, highlight=False),
    )
    task = progress.add_task("", total=steps, completed=step, figures="", ap="")
    progress.start()
    return progress, task
