"""Finding, loading and checking the compiled operators' libraries."""

from __future__ import annotations

import ctypes
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vitadapter_zoo import settings
from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.ops import paths, reference

# Largest relative error in the check after loading. It allows only for another order of sums.
TOLERANCE = 1e-4
# Whether this processor multiplies tiles of bfloat16 (Intel AMX).
AMX = torch.cpu._is_amx_tile_supported()


@dataclass(frozen=True)
class Implementation:
    """How an operator is computed on one kind of device.

    Attributes:
        compiled: True for the compiled kernels, False for PyTorch's own operators.
        why: the loaded library, or the reason why none is used.
    """

    compiled: bool
    why: str


@functools.cache
def implementation(device: str | torch.device) -> Implementation:
    """Return how the operator is computed on ``"cpu"``, ``"cuda:1"`` or another device.

    The first call loads the compiled library and checks it on that device. If there is no library,
    or if its results are wrong, PyTorch's own operators are used instead, with one warning.
    ``VITADAPTER_ZOO_OP=reference`` selects PyTorch's operators; ``VITADAPTER_ZOO_OP=compiled``
    raises an error instead of using them.

    Raises:
        ZooError: ``VITADAPTER_ZOO_OP=compiled`` and the compiled operator cannot be used, or the
            variable has another value.
    """
    choice = settings.operator()
    if choice == "reference":
        return Implementation(compiled=False, why="VITADAPTER_ZOO_OP=reference")
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        reason = f"there is no compiled operator for {device.type} devices"
    else:
        try:
            return Implementation(compiled=True, why=_load(device))
        except _UnusableError as error:
            reason = f"{error}; `vitadapter-zoo build-op` compiles it here"
    if choice == "compiled":
        raise ZooError(f"VITADAPTER_ZOO_OP=compiled, but {reason}")
    warnings.warn(
        f"deformable attention uses PyTorch's own operators, which are many times slower: {reason}",
        stacklevel=2,
    )
    return Implementation(compiled=False, why=reason)


class _UnusableError(Exception):
    """The compiled operator cannot be used; the message is the reason."""


def find(name: str) -> Path | None:
    """Return the library ``name``, installed with the package or built by ``build-op``, or None."""
    file = f"{name}.abi3.so"
    installed = paths.PACKAGE / file
    if installed.is_file():
        return installed  # this avoids `built_folder`, which reads and hashes the sources
    built = paths.built_folder(torch.version.cuda) / file
    return built if built.is_file() else None


def _load(device: torch.device) -> str:
    """Load and check the library for ``device``; return its path and instruction set.

    Raises:
        _UnusableError: there is no library, it cannot be loaded, it does not run on this device, or
            its results are wrong.
    """
    path = find(paths.CUDA_LIBRARY if device.type == "cuda" else paths.CPU_LIBRARY)
    if path is None:
        raise _UnusableError(f"the compiled operator for {device.type} is not installed")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise _UnusableError(f"{path} cannot be loaded: {error}") from error
    # In a new thread: autograd, autocast, inference mode and tracing are settings of the caller's
    # thread and would change the check.
    with ThreadPoolExecutor(1) as thread:
        try:
            off = thread.submit(check, device).result()
        except RuntimeError as error:  # no code for this GPU, a missing operator, ...
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
    """Compare the loaded kernels with the reference on small inputs, forward and backward.

    The reference is computed on the CPU, because ``torch.use_deterministic_algorithms`` may forbid
    PyTorch's own operators on the device.

    Returns:
        The largest error of any output, relative to the largest value of that output; NaN if a
        kernel returned NaN.
    """
    return worst(
        float((got.cpu() - expected).abs().max() / expected.abs().max())
        for channels in (32, 3)  # the vectorized kernel and the general one
        for got, expected in _outputs(channels, device)
    )


def kernel_agrees(name: str, fallback: str, error: Callable[[], float], tolerance: float) -> bool:
    """Return whether one kernel of the library exists and its results are right; warn if not.

    Args:
        name: of the kernel, for the error.
        fallback: what is computed instead and how fast, for the warning.
        error: runs the kernel; returns its largest relative error, or NaN.
        tolerance: the largest error that is right.

    Raises:
        ZooError: ``VITADAPTER_ZOO_OP=compiled`` and the kernel cannot be used.
    """
    try:
        # In a new thread: inference mode, autocast and tracing are settings of the caller's thread
        # and would change the check.
        with ThreadPoolExecutor(1) as thread:
            found = thread.submit(error).result()
        if found <= tolerance:
            return True
        reason = f"it gives wrong results here (relative error {found:.1g})"
    except NotImplementedError:  # the library is older than this kernel
        reason = "the compiled library does not have it"
    advice = f"{reason}; run `vitadapter-zoo build-op` to compile it again"
    if settings.operator() == "compiled":
        raise ZooError(f"VITADAPTER_ZOO_OP=compiled, but {name} cannot be used: {advice}")
    warnings.warn(f"{fallback}: {advice}", stacklevel=4)
    return False


def worst(errors: Iterable[float]) -> float:
    """Return the largest error, or NaN if any is NaN; ``max`` may overlook a NaN."""
    found = list(errors)
    return math.nan if any(math.isnan(error) for error in found) else max(found)


def _outputs(channels: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the output of each kernel on ``device`` and the correct output."""
    value, shapes, locations, weights = arguments = small_input(channels)
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
        return  # the fused CUDA kernels exist in vectorized form only
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


def small_input(channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Create inputs of two images and three levels.

    Locations are inside and outside of the maps. None is on the border between two cells.
    """
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
