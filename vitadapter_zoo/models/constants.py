"""Tensors for a device without waiting for it: uploaded, or made once for each size and kept."""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._guards import active_fake_mode

P = ParamSpec("P")
R = TypeVar("R")


def uploaded(values: Sequence[float] | Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """Return numbers as a tensor on the device and in the dtype of ``like``.

    ``like.new_tensor`` waits until the GPU has done all its work.
    """
    on_cpu = torch.tensor(values, dtype=like.dtype, device="cpu")
    return on_cpu.to(like.device, non_blocking=True)


def pinned(pixels: Tensor, like: Tensor) -> Tensor:
    """Return pixels in pinned memory if ``like`` is on a GPU, which can then copy them itself."""
    if like.device.type == "cuda" and torch.cuda.is_available() and not pixels.is_pinned():
        return pixels.pin_memory()
    return pixels


def uploaded_pixels(pixels: Tensor, like: Tensor) -> Tensor:
    """Copy pixels to the device of ``like`` without waiting for it, then convert their dtype."""
    return pinned(pixels, like).to(like.device, non_blocking=True).to(like.dtype)


def uploaded_batch(images: Sequence[Tensor], like: Tensor) -> Tensor:
    """Join images ``[1, 3, H, W]`` of one shape on the device and in the dtype of ``like``.

    On a GPU they are joined there, because images in pinned memory need no further copy here.
    """
    if like.device.type == "cpu":
        return uploaded_pixels(torch.cat(list(images)), like)
    return torch.cat([uploaded_pixels(image, like) for image in images])


def kept(most: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Keep a function's ``most`` latest results, which depend on its (hashable) arguments only.

    The results are ordinary tensors, in inference mode too, and must not be changed. While a
    compiler traces the function, or with fake tensors, nothing is kept: they belong to the trace.
    During the capture of a CUDA graph nothing new is kept: it belongs to the graph.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        results: OrderedDict[object, R] = OrderedDict()
        lock = threading.Lock()

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling() or active_fake_mode() is not None:
                return function(*args, **kwargs)
            key = (args, tuple(kwargs.items()))
            with lock:
                if key in results:
                    results.move_to_end(key)
                    return results[key]
            with torch.inference_mode(False), torch.no_grad():
                result = function(*args, **kwargs)
            if not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
                with lock:
                    results[key] = result
                    if len(results) > most:
                        results.popitem(last=False)
            return result

        return call

    return decorate


@kept(32)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return fixed numbers as a tensor, which is uploaded once."""
    return torch.tensor(values, dtype=dtype, device=device)
