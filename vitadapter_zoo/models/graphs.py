"""CUDA graphs: the kernels of a computation, launched together.

In half precision a GPU computes an image in less time than Python needs to launch a thousand
kernels one by one. A graph is captured once for each shape of the input and then replayed. It reads
and writes at fixed addresses, so the input is copied to where the graph expects it, and the outputs
are overwritten by the next replay.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Outputs = TypeVar("Outputs")
Compute = Callable[..., Outputs]

MOST_GRAPHS = 8
CALLS_BEFORE = 2  # without a graph, for each shape; a single image is never worth a capture
# A graph gives way to that of another shape when it has not been replayed for so many calls.
# Images of more shapes than there are graphs would otherwise be captured again and again.
CALLS_UNUSED = 200
MOST_COUNTED = 1000  # shapes whose calls are counted
# A graph is refused if more than this share of an output's values is off by more than this
# fraction of the output's largest value. Both computations run the same kernels.
MOST_DIFFERENT = 0.01
MOST_DIFFERENCE = 0.01


class CaptureError(RuntimeError):
    """A computation does something that a graph cannot contain."""


@dataclass(frozen=True)
class Graph(Generic[Outputs]):
    """A captured computation.

    Attributes:
        inputs: the tensors that it reads; new values are copied into them.
        outputs: where it writes its results.
        replay: runs the kernels on the current stream.
        held: tensors that it reads besides its inputs. They must not be freed before the graph is.
    """

    inputs: tuple[Tensor, ...]
    outputs: Outputs
    replay: Callable[[], object]
    held: tuple[Tensor, ...]


Capture = Callable[[Compute[Outputs], tuple[Tensor, ...]], Graph[Outputs]]


class Graphs(Generic[Outputs]):
    """The graphs of one computation, for the shapes that come most often.

    A graph reads the parameters where they were during the capture. Parameters that are changed in
    place are therefore up to date; if one is replaced, all graphs are discarded. Without a graph
    the computation runs as usual: for gradients, under autocast, in training mode, with forward
    hooks or a replaced ``forward``, which would not run in a replay, after ``torch.compile``, and
    for good after a capture has failed, with one warning.

    Only one thread at a time may use the outputs, so callers hold `lock` until they have read them.

    Args:
        capture: captures a computation; the default is that of CUDA.

    Attributes:
        lock: held by the user of the outputs.
        failed: why no graphs are captured any more, or "".
    """

    def __init__(self, capture: Capture[Outputs] | None = None) -> None:
        self.lock = threading.RLock()
        self.failed = ""
        self._capture = capture or CudaCapture()
        self._graphs: OrderedDict[object, tuple[Graph[Outputs], int]] = OrderedDict()
        self._calls: OrderedDict[object, int] = OrderedDict()
        self._call = 0
        self._weights: list[Tensor] = []
        self._places: Sequence[object] = ()

    def __len__(self) -> int:
        """Return the number of graphs."""
        return len(self._graphs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles of a model have no graphs."""
        return (Graphs, ())

    def clear(self) -> None:
        """Discard all graphs and the memory that they keep."""
        with self.lock:
            self._graphs.clear()
            self._calls.clear()
            self._weights, self._places = [], ()

    def run(
        self,
        compute: Compute[Outputs],
        inputs: Sequence[Tensor],
        modules: Sequence[nn.Module],
        key: object = None,
    ) -> Outputs:
        """Return ``compute(*inputs)``, by a graph if there is one.

        Args:
            compute: a function of tensors that always runs the same kernels for the same shapes.
                It must not change its inputs or keep tensors.
            inputs: tensors on one device.
            modules: everything with weights that ``compute`` uses.
            key: what else the kernels depend on.

        Returns:
            The outputs; the next call overwrites them.
        """
        weights = None if self.failed or _is_special() else weights_of(modules)
        if weights is None:
            return compute(*inputs)
        # The weights are part of the graph's memory: they are kept, so another tensor can never be
        # at the same address.
        places = [(x.data_ptr(), x.dtype, x.stride()) for x in weights]
        with self.lock, torch.inference_mode():
            if places != self._places:
                self.clear()
                self._weights, self._places = [x.detach() for x in weights], places
            shapes = tuple((x.shape, x.dtype, x.device) for x in inputs)
            full_key = (shapes, key, torch.are_deterministic_algorithms_enabled())
            graph = self._graph(full_key, compute, inputs)
            if graph is None:
                return compute(*inputs)
            for target, source in zip(graph.inputs, inputs, strict=True):
                target.copy_(source)
            graph.replay()
            return graph.outputs

    def _graph(
        self, key: object, compute: Compute[Outputs], inputs: Sequence[Tensor]
    ) -> Graph[Outputs] | None:
        """Return the graph of a key, captured if it is time to, or None."""
        self._call += 1
        found = self._graphs.get(key)
        if found is None:
            if not self._worth_capturing(key):
                return None
            graph = self._captured(compute, inputs)
            if graph is None:
                return None
        else:
            graph = found[0]
        self._graphs[key] = (graph, self._call)
        self._graphs.move_to_end(key)
        return graph

    def _worth_capturing(self, key: object) -> bool:
        """Count a call without a graph; return whether to capture one, and make room for it."""
        calls = self._calls.pop(key, 0) + 1
        self._calls[key] = calls
        if len(self._calls) > MOST_COUNTED:
            self._calls.popitem(last=False)
        if calls <= CALLS_BEFORE:
            return False
        if len(self._graphs) >= MOST_GRAPHS:
            oldest, (_, last_call) = next(iter(self._graphs.items()))
            if self._call - last_call <= CALLS_UNUSED:
                return False
            del self._graphs[oldest]
        return True

    def _captured(
        self, compute: Compute[Outputs], inputs: Sequence[Tensor]
    ) -> Graph[Outputs] | None:
        """Capture a graph and compare a replay with the computation; None if either fails."""
        static = tuple(x.clone() for x in inputs)
        try:
            expected = compute(*static)
            graph = self._capture(compute, static)
            graph.replay()
            if _agree(graph.outputs, expected):
                return graph
            self.failed = "its results differ from those without a graph"
        except RuntimeError as error:
            self.failed = str(error).strip().splitlines()[0]
        self.clear()
        warnings.warn(
            f"the network runs without CUDA graphs, which is slower: {self.failed}", stacklevel=2
        )
        return None


def weights_of(modules: Sequence[nn.Module]) -> list[Tensor] | None:
    """Return all parameters and buffers, or None if a module would do more than its kernels.

    A module in training mode, with a hook or with a ``forward`` of its own needs Python each time.
    """
    found: list[Tensor] = []
    pending = list(modules)
    while pending:
        module = pending.pop()
        if (
            module.training
            or module._forward_hooks
            or module._forward_pre_hooks
            or module._compiled_call_impl is not None
            or "forward" in module.__dict__
        ):
            return None
        found += [x for x in module._parameters.values() if x is not None]
        found += [x for x in module._buffers.values() if x is not None]
        pending += [x for x in module._modules.values() if x is not None]
    return found


def _is_special() -> bool:
    """Return whether the caller's settings make the computation more than its kernels."""
    return (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cuda")
        or torch.compiler.is_compiling()
        or torch_modules._has_any_global_hook()
    )


def _agree(outputs: object, expected: object) -> bool:
    pairs = zip(tree_leaves(outputs), tree_leaves(expected), strict=True)
    return all(_is_close(mine, right) for mine, right in pairs if right.is_floating_point())


def _is_close(mine: Tensor, right: Tensor) -> bool:
    if mine.shape != right.shape:
        return False
    # Few values may differ, because equal scores may come in another order. NaN differs.
    limit = MOST_DIFFERENCE * right.abs().max()
    different = ~((mine - right).abs() <= limit)
    return bool(different.float().mean() <= MOST_DIFFERENT)


class Watch(TorchDispatchMode):
    """Refuse what a graph cannot contain, and collect the tensors that it reads.

    A copy from the CPU is the dangerous case: CUDA captures it without an error, and the replay
    reads memory that has been freed since.

    Attributes:
        inputs: tensors that exist before the computation and that it reads.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inputs: dict[int, Tensor] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator.

        Raises:
            CaptureError: its result depends on values, or it copies between CPU and device.
        """
        given = list(_tensors((args, kwargs)))
        on_device = [x for x in given if x.device.type != "cpu"]
        if _depends_on_values(func, given):
            raise CaptureError(f"{func}: the CPU has to wait for its result")
        result = func(*args, **(kwargs or {}))
        made = list(_tensors(result))
        # Of a CPU tensor with one number, an operator other than a copy takes the value.
        is_copy = func._schema.name in ("aten::to", "aten::_to_copy", "aten::copy_")
        from_cpu = any(x.device.type == "cpu" and (x.dim() or is_copy) for x in given)
        if on_device and any(x.device.type == "cpu" for x in made):
            raise CaptureError(f"{func} copies from the device")
        if from_cpu and any(x.device.type != "cpu" for x in (*on_device, *made)):
            raise CaptureError(f"{func} copies to the device")
        for x in on_device:
            if x.untyped_storage()._cdata not in self._made:
                self.inputs[id(x)] = x
        self._made.update(x.untyped_storage()._cdata for x in made)
        return result


def _depends_on_values(func: Any, given: Sequence[Tensor]) -> bool:
    """Return whether the shape of an operator's result depends on values on the device."""
    if func._schema.name == "aten::index":  # it has the tag for all kinds of indices
        return any(x.dtype in (torch.bool, torch.uint8) for x in given[1:])
    kinds = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return bool(kinds & set(func.tags)) and any(x.device.type != "cpu" for x in given)


def _tensors(values: object) -> Iterator[Tensor]:
    return (x for x in tree_leaves(values) if isinstance(x, Tensor))


class CudaCapture:
    """Capture of CUDA graphs that share their memory: only one of them is in use at a time."""

    def __init__(self) -> None:
        self._shared: dict[torch.device, tuple[Any, torch.cuda.Stream]] = {}

    def __call__(self, compute: Compute[Outputs], inputs: tuple[Tensor, ...]) -> Graph[Outputs]:
        """Capture ``compute(*inputs)``.

        Raises:
            RuntimeError: it contains what a graph cannot contain, or the memory is exhausted.
        """
        device = inputs[0].device
        with torch.cuda.device(device):
            if device not in self._shared:
                pool = torch.cuda.graph_pool_handle()
                self._shared[device] = pool, torch.cuda.Stream()
            pool, stream = self._shared[device]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                compute(*inputs)  # libraries create their handles for a stream in its first call
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads decode images and allocate pinned memory meanwhile.
            with (
                torch.cuda.graph(
                    graph, pool=pool, stream=stream, capture_error_mode="thread_local"
                ),
                Watch() as watch,
            ):
                outputs = compute(*inputs)
        return Graph(inputs, outputs, graph.replay, tuple(watch.inputs.values()))
