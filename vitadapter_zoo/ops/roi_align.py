"""RoIAlign (arXiv:1703.06870, section 3) on the CPU, computed by a compiled kernel.

torchvision loops over single channels, and its backward pass recomputes every sample's weights for
each channel. This took a quarter of the training time of a small network. The kernel needs a tenth
of that time.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

from vitadapter_zoo.ops import library
from vitadapter_zoo.ops.deform_attn import LIBRARY

# The kernels' maps and results are in channels-last order: [N, H, W, C] and [R, size, size, C].
LIBRARY.define("_roi_align(Tensor maps, Tensor rois, int size, float scale) -> Tensor")
LIBRARY.define(
    "_roi_align_rows(Tensor(a!) output, Tensor rows, Tensor maps, Tensor rois, float scale) -> ()"
)
LIBRARY.define(
    "_roi_align_backward(Tensor grad_output, Tensor rois, int images, int height, int width, "
    "float scale) -> Tensor"
)
TOLERANCE = 1e-5  # largest error that the check allows, relative to the largest value


class _RoIAlign(torch.autograd.Function):
    """The compiled kernel with its gradient; the arguments are those of `roi_align`."""

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
    """Compute torchvision's ``roi_align(x, rois, size, scale, aligned=True)``.

    The number of samples adapts to the boxes. The order of sums differs from torchvision's. Call
    this function only if `usable` returns True. ``rois`` get no gradient, and there are no second
    derivatives.

    Args:
        x: float32 ``[N, C, H, W]`` on the CPU; it is copied unless it is in channels-last order.
        rois: float32 ``[R, 5]`` as (image index, x1, y1, x2, y2).
        size: bins per side.
        scale: cells of the map per unit of ``rois``.

    Returns:
        ``[R, C, size, size]`` in channels-last order.

    Raises:
        RuntimeError: a shape or dtype is wrong, or a box has an image index outside of ``x``.
    """
    return _RoIAlign.apply(x, rois, size, scale)


def roi_align_into(output: Tensor, rows: Tensor, x: Tensor, rois: Tensor, scale: float) -> None:
    """Write `roi_align` of each box to a row of ``output``, without gradients.

    Args:
        output: ``[rows, size, size, C]``, contiguous, of the dtype of ``x``.
        rows: int64 ``[R]``, the row of each box.
        x: float32 or bfloat16 ``[N, C, H, W]`` on the CPU. Sums are float32.
        rois: float32 ``[R, 5]``, see `roi_align`.
        scale: cells of the map per unit of ``rois``.

    Raises:
        RuntimeError: a shape or dtype is wrong, or a box has an image index outside of ``x``.
    """
    maps = x.permute(0, 2, 3, 1)
    torch.ops.vitadapter_zoo._roi_align_rows(output, rows, maps, rois, scale)


def usable() -> bool:
    """Return whether the compiled kernel exists and agrees with torchvision.

    If the other compiled operators are used but this one is not usable, there is one warning.

    Raises:
        ZooError: ``VITADAPTER_ZOO_OP=compiled`` and the kernel cannot be used.
    """
    return library.implementation(torch.device("cpu")).compiled and _works()


@functools.cache
def _works() -> bool:
    return library.kernel_agrees(
        "RoIAlign",
        "RoIAlign uses torchvision or PyTorch operators, which are several times slower",
        _error,
        TOLERANCE,
    )


def _error() -> float:
    """Return the kernel's largest error on a small input, relative to the largest value, or NaN."""
    rois = torch.tensor(
        [[0, 2, 3, 30, 21], [1, -3, -9, 50, 11], [0, 5, 5, 5, 9], [1, 40, 1, 47, 9]],
        dtype=torch.float32,
    )
    errors = []
    for channels in (3, 70):
        numbers = torch.arange(2 * channels * 6 * 9, dtype=torch.float32) * 0.7548776662
        results = []
        for function in (roi_align, _torchvision):
            x = numbers.sin().view(2, channels, 6, 9).requires_grad_()
            pooled = function(x, rois, 3, 0.25)
            weights = torch.linspace(-1, 1, pooled.numel(), dtype=torch.float32)
            (grad,) = torch.autograd.grad(pooled, x, weights.view(pooled.shape))
            results.append((pooled.detach(), grad))
        for mine, right in zip(*results, strict=True):
            errors.append(float((mine - right).abs().max() / right.abs().max()))
        into = torch.full((4, 3, 3, channels), torch.nan, dtype=torch.float32)
        rows = torch.tensor([2, 0, 3, 1])
        roi_align_into(into, rows, x.detach(), rois, 0.25)
        errors.append(float((into[rows].permute(0, 3, 1, 2) - results[1][0]).abs().max()))
    return library.worst(errors)


def _torchvision(x: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
    return torchvision_roi_align(x, rois, size, scale, -1, aligned=True)
