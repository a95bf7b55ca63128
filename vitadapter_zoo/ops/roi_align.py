"""RoIAlign (arXiv:1703.06870, section 3) on the CPU, by a compiled kernel.

torchvision loops over single channels, and its backward pass computes every sample's weights again
for each of them, which took a quarter of a small network's training. The kernel takes a tenth of
that.
"""

import functools
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.ops import library
from vitadapter_zoo.ops.deform_attn import LIBRARY

# Maps and results are in channels-last order: [N, H, W, C] and [R, size, size, C].
LIBRARY.define("_roi_align(Tensor maps, Tensor rois, int size, float scale) -> Tensor")
LIBRARY.define(
    "_roi_align_backward(Tensor grad_output, Tensor rois, int images, int height, int width, "
    "float scale) -> Tensor"
)
TOLERANCE = 1e-5  # of the check, relative to the largest value


class _RoIAlign(torch.autograd.Function):
    """The compiled kernel; arguments are `roi_align`'s."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
        ctx.save_for_backward(rois)
        ctx.images, _, ctx.height, ctx.width = x.shape
        ctx.scale = scale
        pooled = torch.ops.vitadapter_zoo._roi_align(x.permute(0, 2, 3, 1), rois, size, scale)
        return pooled.permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (rois,) = ctx.saved_tensors
        grad = torch.ops.vitadapter_zoo._roi_align_backward(
            grads[0].permute(0, 2, 3, 1), rois, ctx.images, ctx.height, ctx.width, ctx.scale
        )
        return grad.permute(0, 3, 1, 2), None, None, None


def roi_align(x: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
    """Torchvision's ``roi_align(x, rois, size, scale, aligned=True)``, in channels-last order.

    The number of samples adapts to the boxes. Sums are made in another order than torchvision's.
    Call it only where `usable` says so. ``rois`` get no gradient, and there are no second
    derivatives.

    Args:
        x: float32 ``[N, C, H, W]`` on the CPU; a copy is made unless it is in channels-last order.
        rois: float32 ``[R, 5]`` as (image index, x1, y1, x2, y2).
        size: bins per side.
        scale: cells of the map per unit of ``rois``.

    Returns:
        ``[R, C, size, size]`` in channels-last order.

    Raises:
        RuntimeError: other shapes or dtypes, or a box without an image.
    """
    return _RoIAlign.apply(x, rois, size, scale)


def usable() -> bool:
    """Whether the compiled kernel is there and computes what torchvision computes.

    Where the compiled operators are used but this one fails, a warning says so once.

    Raises:
        ZooError: ``VITADAPTER_ZOO_OP=compiled`` and the kernel cannot be used.
    """
    return library.implementation("cpu").compiled and _works()


@functools.cache
def _works() -> bool:
    try:
        # In a thread of its own: the caller may be in inference mode, under autocast or tracing,
        # all of which belong to the thread.
        with ThreadPoolExecutor(1) as thread:
            reason = thread.submit(_difference).result()
    except NotImplementedError:  # compiled from sources older than the kernel
        reason = "the compiled library does not have it"
    if reason is None:
        return True
    advice = f"{reason}; `vitadapter-zoo build-op` compiles it again"
    if os.environ.get("VITADAPTER_ZOO_OP") == "compiled":
        raise ZooError(f"VITADAPTER_ZOO_OP=compiled, but RoIAlign cannot be used: {advice}")
    warnings.warn(f"RoIAlign is computed several times slower: {advice}", stacklevel=3)
    return False


def _difference() -> str | None:
    """What is wrong with the kernel's results and gradients on a small input, None if nothing."""
    rois = torch.tensor(
        [[0, 2, 3, 30, 21], [1, -3, -9, 50, 11], [0, 5, 5, 5, 9], [1, 40, 1, 47, 9]],
        dtype=torch.float32,
    )
    for channels in (3, 70):
        numbers = torch.arange(2 * channels * 6 * 9, dtype=torch.float32) * 0.7548776662
        results = []
        for function in (roi_align, _torchvision):
            x = numbers.sin().view(2, channels, 6, 9).requires_grad_()
            pooled = function(x, rois, 3, 0.25)
            weights = torch.linspace(-1, 1, pooled.numel()).view(pooled.shape)
            (grad,) = torch.autograd.grad(pooled, x, weights)
            results.append((pooled.detach(), grad))
        for mine, right in zip(*results, strict=True):
            error = float((mine - right).abs().max() / right.abs().max())
            if not error <= TOLERANCE:
                return f"it gives wrong results here (relative error {error:.1g})"
    return None


def _torchvision(x: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
    return torchvision_roi_align(x, rois, size, scale, -1, aligned=True)
