"""Training runs that take seconds: settings, interruption, comparison of the results."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

NANO = "adapter-n-emoji"
QUICK: dict[str, Any] = {
    "start": "scratch",
    "input_size": (64, 64),
    "batch_size": 2,
    "lr": 1e-3,
    "clip": 5,
    "augment": "none",
    "schedule": "cosine",
    "eval_every": 1000,
    "workers": 0,
    "device": "cpu",
    "progress": False,
}
OPTIONS = [
    *("--from", "scratch", "--input-size", "64", "64", "--batch-size", "2", "--lr", "1e-3"),
    *("--clip", "5", "--augment", "none", "--schedule", "cosine", "--eval-every", "1000"),
    *("--workers", "0", "--device", "cpu"),
]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def interrupt_when_saved(out: Path, saves: int, number: int = signal.SIGINT) -> threading.Thread:
    """Signal this process when a run has saved its state so many times."""

    def watch() -> None:
        seen: set[int] = set()
        while len(seen) < saves:
            with contextlib.suppress(OSError):
                seen.add((out / "state.pt").stat().st_mtime_ns)
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread
