"""Tensors for a device without waiting for it: uploaded, or made once for each size and kept."""

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._guards import active_fake_mode

P = ParamSpec("P")
R = TypeVar("R")


def uploaded(values: Sequence[float], like: Tensor) -> Tensor:
    """Return numbers as a tensor on the device and in the dtype of ``like``.

    ``like.new_tensor`` waits until the GPU has done all its work.
    """
    on_cpu = torch.tensor(values, dtype=like.dtype, device="cpu")
    return on_cpu.to(like.device, non_blocking=True)


def uploaded_pixels(pixels: Tensor, like: Tensor) -> Tensor:
    """Copy pixels to the device of ``like`` without waiting for it, then convert their dtype."""
    if like.device.type == "cuda" and torch.cuda.is_available():
        pixels = pixels.pin_memory()
    return pixels.to(like.device, non_blocking=True).to(like.dtype)


def kept(most: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Keep a function's ``most`` latest results, which depend on its (hashable) arguments only.

    The results are ordinary tensors, in inference mode too, and must not be changed. While a
    compiler traces the function, or with fake tensors, nothing is kept: they belong to the trace.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        cached = functools.lru_cache(most)(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling() or active_fake_mode() is not None:
                return function(*args, **kwargs)
            with torch.inference_mode(False), torch.no_grad():
                return cached(*args, **kwargs)  # type: ignore[arg-type]

        return call

    return decorate
