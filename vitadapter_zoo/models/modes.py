"""Evaluation mode for the time of a call."""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn


@dataclass
class _Calls:
    """The calls of one model that are under way, and the modules whose mode they changed."""

    count: int
    changed: list[nn.Module]


_LOCK = threading.Lock()
_UNDER_WAY: weakref.WeakKeyDictionary[nn.Module, _Calls] = weakref.WeakKeyDictionary()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block; afterwards each module has its own mode again.

    Calls from several threads may overlap: the modes return after the last one. Otherwise the first
    call to end would put the model into training mode while another one computes.
    """
    with _LOCK:
        calls = _UNDER_WAY.setdefault(model, _Calls(0, []))
        calls.count += 1
        for module in model.modules():
            if module.training:
                module.training = False
                calls.changed.append(module)
    try:
        yield
    finally:
        with _LOCK:
            calls.count -= 1
            if not calls.count:
                del _UNDER_WAY[model]
                for module in calls.changed:
                    module.training = True
