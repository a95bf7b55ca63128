"""A graph of CPU operators: captured like a CUDA graph, with the same rules for memory.

A replay runs the recorded operators without the Python code that called them. It reads its inputs
and weights where they were in memory, and overwrites the recorded outputs. On the fake CUDA device
the whole replay counts as one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from fake_cuda import Device, FakeTensor
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from vitadapter_zoo.models.graphs import Graph, Watch

Outputs = TypeVar("Outputs")


class Recorder(TorchDispatchMode):
    """Record each operator with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_map(_alias, (args, dict(kwargs or {})))
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, *given, tree_map(_alias, result)))
        return result

    def replay(self) -> None:
        """Run the operators again; write each result to where it was."""
        with _disable_current_modes(), torch.inference_mode():
            for func, args, kwargs, results in self.calls:
                if "device" in kwargs:
                    kwargs = kwargs | {"device": torch.device("cpu")}
                places = {_place(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
                fresh = func(*args, **kwargs)
                for old, new in zip(tree_leaves(results), tree_leaves(fresh), strict=True):
                    if isinstance(old, Tensor) and _place(old) not in places:
                        old.copy_(new)  # neither a view nor changed in place


class RecordedCapture:
    """Capture for `graphs.Graphs`.

    Args:
        device: the fake device, if the tensors are on one.

    Attributes:
        captured: the number of graphs.
        waits: how often the CPU waited for the device during the captures.
        launches: number of operators in the last graph.
    """

    def __init__(self, device: Device | None = None) -> None:
        self.device = device
        self.captured = self.waits = self.launches = 0

    def __call__(
        self, compute: Callable[..., Outputs], inputs: tuple[Tensor, ...]
    ) -> Graph[Outputs]:
        before = (self.device.synchronisations, self.device.launches) if self.device else (0, 0)
        with Recorder() as recorder, Watch() as watch:
            outputs = compute(*inputs)
        self.captured += 1
        if self.device:
            self.waits += self.device.synchronisations - before[0]
            self.launches = self.device.launches - before[1]

        def replay() -> None:
            recorder.replay()
            if self.device:
                self.device.launches += 1

        return Graph(inputs, outputs, replay, tuple(watch.inputs.values()))


def _alias(x: Any) -> Any:
    """Return the same memory, even if the tensor object gets other memory later."""
    if not isinstance(x, Tensor):
        return x
    with _disable_current_modes():
        return (x.original_tensor if isinstance(x, FakeTensor) else x).detach()


def _place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
