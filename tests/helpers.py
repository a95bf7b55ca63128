"""Checks that several test modules make."""

from pathlib import Path

import standins
import torch

from vitadapter_zoo import MaskRCNN


def same_weights(model: MaskRCNN, row: str) -> bool:
    """Whether the model holds the row's stand-in weights, to the bit."""
    expected = standins.state_dict(row)
    state = model.state_dict()
    return all(torch.equal(state[name], value) for name, value in expected.items())


def left_behind(home: Path) -> list[str]:
    """Every file in the cache but the locks."""
    files = (path for path in home.rglob("*") if path.is_file() and path.suffix != ".lock")
    return sorted(path.name for path in files)
