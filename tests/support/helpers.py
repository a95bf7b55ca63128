"""Checks that several test modules make."""

import functools
import os
from pathlib import Path
from typing import Any

import standins
import torch
from torch import Tensor

from vitadapter_zoo import MaskRCNN


@functools.lru_cache(maxsize=2)
def _expected(row: str) -> dict[str, Tensor]:
    return standins.state_dict(row)


def same_weights(model: MaskRCNN, row: str) -> bool:
    """Whether the model holds the row's stand-in weights, to the bit."""
    state = model.state_dict()
    return all(torch.equal(state[name], value) for name, value in _expected(row).items())


def resident(field: str) -> int:
    """Bytes of this process's memory, ``VmRSS`` now or ``VmHWM`` at most, from the system."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[field].split()[0]) * 1024


def forget_the_peak() -> None:
    """Let ``VmHWM`` begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def left_behind(home: Path) -> list[str]:
    """Every file in the cache but the locks."""
    files = (path for path in home.rglob("*") if path.is_file() and path.suffix != ".lock")
    return sorted(path.name for path in files)


class RunsCode:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)
