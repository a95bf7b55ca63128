"""The torch device that a command runs on: the default, and the check of ``--device``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.text import quoted, shown

if TYPE_CHECKING:
    import torch


def default_device() -> str:
    """Return ``"cuda"`` if torch can use a GPU, else ``"cpu"``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def usable_device(name: str) -> torch.device:
    """Return the torch device of that name, after allocating a tensor on it.

    Raises:
        ZooError: the name is not a device, or this machine has no such device.
    """
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = shown(str(error).splitlines()[0])
        raise ZooError(f"the device {quoted(name)} cannot be used here: {reason}") from error
    return device
