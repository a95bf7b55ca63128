"""The compiled operator: where its libraries are, and whether they compute what they should."""

from __future__ import annotations

import ctypes
import functools
import math
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vitadapter_zoo import settings
from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.ops import paths, reference

# Relative error that the check after loading allows: sums in another order, and no more.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Implementation:
    """How an operator is computed on one kind of device.

    Attributes:
        compiled: by the compiled kernels; otherwise by PyTorch's own operators.
        why: what was loaded from where, or why nothing was.
    """

    compiled: bool
    why: str


@functools.cache
def implementation(device: str | torch.device) -> Implementation:
    """How the operator is computed on ``"cpu"``, ``"cuda:1"`` or another device.

    The first call loads the compiled library and checks it on that device. Where there is none, or
    where it does not give what PyTorch's operators give, those are used, with one warning.
    ``VITADAPTER_ZOO_OP=reference`` asks for them; ``=compiled`` makes their use an error.

    Raises:
        ZooError: ``VITADAPTER_ZOO_OP=compiled`` and the compiled operator cannot be used, or the
            variable has another value.
    """
    wish = settings.operator()
    if wish == "reference":
        return Implementation(compiled=False, why="VITADAPTER_ZOO_OP=reference")
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        reason = f"there is no compiled operator for {device.type} devices"
    else:
        try:
            return Implementation(compiled=True, why=_load(device))
        except _UnusableError as error:
            reason = f"{error}; `vitadapter-zoo build-op` compiles it here"
    if wish == "compiled":
        raise ZooError(f"VITADAPTER_ZOO_OP=compiled, but {reason}")
    warnings.warn(
        f"deformable attention is computed by PyTorch's own operators, many times slower: {reason}",
        stacklevel=2,
    )
    return Implementation(compiled=False, why=reason)


class _UnusableError(Exception):
    """Why the compiled operator is not used."""


def find(name: str) -> Path | None:
    """The library ``name``: as installed with the package, or else as built by ``build-op``."""
    file = f"{name}.abi3.so"
    installed = paths.PACKAGE / file
    if installed.is_file():
        return installed  # without reading the sources, which tell one build in the cache by
    built = paths.built_folder(torch.version.cuda) / file
    return built if built.is_file() else None


def _load(device: torch.device) -> str:
    """Load and check what computes on ``device``; says what it is.

    Raises:
        _UnusableError: there is none, it cannot be loaded, it does not run on this device, or it
            computes something else.
    """
    path = find(paths.CUDA_LIBRARY if device.type == "cuda" else paths.CPU_LIBRARY)
    if path is None:
        raise _UnusableError(f"the compiled operator for {device.type} is not installed")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise _UnusableError(f"{path} cannot be loaded: {error}") from error
    # In a thread of its own: the caller may be under autograd, autocast, inference mode or tracing,
    # all of which belong to the thread.
    with ThreadPoolExecutor(1) as thread:
        try:
            off = thread.submit(check, device).result()
        except RuntimeError as error:  # no code for this GPU, an operator that is not there, ...
            first_line = str(error).strip().splitlines()[0]
            raise _UnusableError(f"{path} does not run on {device}: {first_line}") from error
    if not off <= TOLERANCE:
        raise _UnusableError(f"{path} gives wrong results here (relative error {off:.1g})")
    if device.type == "cuda":
        return str(path)
    instruction_set = ctypes.CDLL(str(path)).vitadapter_zoo_instruction_set
    instruction_set.restype = ctypes.c_char_p
    return f"{path} ({instruction_set().decode()})"


def check(device: torch.device) -> float:
    """How far the loaded kernels are from the reference on small inputs, forward and backward.

    The reference is computed on the CPU: PyTorch's own operators may be forbidden on the device
    (``torch.use_deterministic_algorithms``), and what they compute there is not the question.

    Returns:
        The largest error of any output, relative to the largest value of that output; NaN where
        a kernel gives NaN.
    """
    return worst(
        float((got.cpu() - expected).abs().max() / expected.abs().max())
        for channels in (32, 3)  # the vectorized kernel and the general one
        for got, expected in _outputs(channels, device)
    )


def worst(errors: Iterable[float]) -> float:
    """The largest of the errors; NaN where one is NaN, which ``max`` may overlook."""
    found = list(errors)
    return math.nan if any(math.isnan(error) for error in found) else max(found)


def _outputs(channels: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """What each kernel gives on ``device``, with what is right."""
    value, shapes, locations, weights = arguments = _small_input(channels)
    moved = [tensor.to(device) for tensor in arguments]
    grad = torch.linspace(-1, 1, 2 * 7 * 2 * channels, dtype=torch.float32).view(2, 7, -1)
    kernels = torch.ops.vitadapter_zoo
    yield kernels._ms_deform_attn(*moved), reference.ms_deform_attn(*arguments)
    yield from zip(
        kernels._ms_deform_attn_backward(grad.to(device), *moved),
        reference.ms_deform_attn_backward(grad, *arguments),
        strict=True,
    )
    if device.type == "cuda" and channels != 32:
        return  # its fused kernels are vectorized only
    points = locations[0, :, 0, 0, 0].contiguous()
    offsets, logits = locations * 3 - 1, weights * 4
    given = [tensor.to(device) for tensor in (value, shapes, points, offsets, logits)]
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in (value, offsets, logits)]
        located = reference.locate(shapes, points, *leaves[1:])
        right = reference.ms_deform_attn(leaves[0], shapes, *located)
        gradients = torch.autograd.grad(right, leaves, grad)
    yield kernels._ms_deform_attn_fused(*given), right.detach()
    if device.type == "cuda":
        mine = kernels._ms_deform_attn_fused_backward(grad.to(device), *given)
        yield from zip(mine, gradients, strict=True)


def _small_input(channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two images, three levels, locations inside and outside, none of them between two cells."""
    shapes = torch.tensor([[4, 5], [2, 3], [1, 2]])
    pixels = 28
    value = torch.linspace(-3, 3, 2 * pixels * 2 * channels, dtype=torch.float32)
    count = 2 * 7 * 2 * 3 * 4
    steps = torch.arange(count * 2, dtype=torch.float32)
    locations = (steps * 0.7548776662).frac() * 1.4 - 0.2
    weights = torch.linspace(0.1, 1, count, dtype=torch.float32)
    return (
        value.sin().view(2, pixels, 2, channels),
        shapes,
        locations.view(2, 7, 2, 3, 4, 2),
        weights.view(2, 7, 2, 3, 4),
    )
