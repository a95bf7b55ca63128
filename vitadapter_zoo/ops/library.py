"""The compiled operator: where its libraries are, and whether they compute what they should."""

from __future__ import annotations

import ctypes
import functools
import warnings
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
def implementation(device_type: str) -> Implementation:
    """How the operator is computed on ``"cpu"``, ``"cuda"`` or another type of device.

    Loads and checks the compiled library when it is called first. Where there is none, or where it
    does not give what PyTorch's operators give, those are used, and a warning says so once.
    ``VITADAPTER_ZOO_OP=reference`` asks for them; ``=compiled`` makes their use an error.

    Raises:
        ZooError: ``VITADAPTER_ZOO_OP=compiled`` and the compiled operator cannot be used, or the
            variable has another value.
    """
    wish = settings.operator()
    if wish == "reference":
        return Implementation(compiled=False, why="VITADAPTER_ZOO_OP=reference")
    if device_type not in ("cpu", "cuda"):
        reason = f"there is no compiled operator for {device_type} devices"
    else:
        try:
            return Implementation(compiled=True, why=_load(device_type))
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


def _load(device_type: str) -> str:
    """Load and check what computes on ``device_type``; says what it is.

    Raises:
        _UnusableError: there is none, it cannot be loaded, or it computes something else.
    """
    path = find(paths.CUDA_LIBRARY if device_type == "cuda" else paths.CPU_LIBRARY)
    if path is None:
        raise _UnusableError(f"the compiled operator for {device_type} is not installed")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise _UnusableError(f"{path} cannot be loaded: {error}") from error
    # In a thread of its own: the caller may be under autograd, autocast, inference mode or tracing,
    # all of which belong to the thread.
    with ThreadPoolExecutor(1) as thread:
        off = thread.submit(check, torch.device(device_type)).result()
    if not off <= TOLERANCE:
        raise _UnusableError(f"{path} gives wrong results here (relative error {off:.1g})")
    if device_type == "cuda":
        return str(path)
    instruction_set = ctypes.CDLL(str(path)).vitadapter_zoo_instruction_set
    instruction_set.restype = ctypes.c_char_p
    return f"{path} ({instruction_set().decode()})"


def check(device: torch.device) -> float:
    """How far the loaded kernels are from the reference on a small input, forward and backward.

    Returns:
        The largest error of any output, relative to the largest value of that output.
    """
    worst = 0.0
    for channels in (32, 3):  # the vectorised kernel and the general one
        arguments = [tensor.to(device) for tensor in _small_input(channels)]
        grad = torch.linspace(-1, 1, 2 * 7 * 2 * channels, device=device).view(2, 7, -1)
        mine = [
            torch.ops.vitadapter_zoo._ms_deform_attn(*arguments),
            *torch.ops.vitadapter_zoo._ms_deform_attn_backward(grad, *arguments),
        ]
        right = [
            reference.ms_deform_attn(*arguments),
            *reference.ms_deform_attn_backward(grad, *arguments),
        ]
        if device.type == "cpu":  # the fused kernel, which the networks use, is there alone
            value, shapes, locations, weights = arguments
            fused = (locations[0, :, 0, 0, 0].contiguous(), locations * 3 - 1, weights * 4)
            mine.append(torch.ops.vitadapter_zoo._ms_deform_attn_fused(value, shapes, *fused))
            right.append(reference.ms_deform_attn(value, shapes, *reference.locate(shapes, *fused)))
        for got, expected in zip(mine, right, strict=True):
            worst = max(worst, float((got - expected).abs().max() / expected.abs().max()))
    return worst


def _small_input(channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two images, two levels, locations inside and outside, none of them between two cells."""
    shapes = torch.tensor([[4, 5], [2, 3]])
    value = torch.linspace(-3, 3, 2 * 26 * 2 * channels).sin().view(2, 26, 2, channels)
    locations = (torch.arange(2 * 7 * 2 * 2 * 3 * 2) * 0.7548776662).frac() * 1.4 - 0.2
    weights = torch.linspace(0.1, 1, 2 * 7 * 2 * 2 * 3)
    return value, shapes, locations.view(2, 7, 2, 2, 3, 2), weights.view(2, 7, 2, 2, 3)
