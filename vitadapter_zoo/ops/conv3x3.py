"""3x3 convolutions on the CPU by Winograd's minimal filtering (arXiv:1509.09308).

A convolution of 256 channels already runs at the rate of a matrix product, so only fewer products
make it faster. F(4x4, 3x3) needs a quarter of them. Rounding errors are about twice as large as
those of PyTorch's convolution: 1e-6 to 4e-6 of the largest value.

Maps in bfloat16 are transformed and multiplied in float32, so only the result is rounded, as in
PyTorch's convolution. Products in bfloat16 would be less exact than PyTorch's, because transformed
maps and weights would be rounded first. Processors with AMX multiply bfloat16 so fast that
PyTorch's convolution takes a third of the kernel's time; there it is used.

The weights are transformed in each call. For 256 channels this takes 3 ms of one core (13 times in
an image). A module that kept the result would need four times the memory of its weights, and a copy
of them to notice changes.

NaN and infinite values: wherever PyTorch's convolution returns one of them, so does this operator.
It may return them at other pixels of the same 4x4 tile too, because all pixels of a tile are
computed from the same sums, and NaN instead of infinity. Values above about 1e37 may overflow.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from vitadapter_zoo.ops import library
from vitadapter_zoo.ops.deform_attn import LIBRARY
from vitadapter_zoo.ops.library import AMX

LIBRARY.define("conv3x3(Tensor x, Tensor weight, Tensor? bias, bool relu) -> Tensor")
# The kernel's maps are in channels-last order: [N, H, W, C].
LIBRARY.define(
    "_conv3x3_maps(Tensor maps, Tensor weight, Tensor? bias, int tile, bool relu) -> Tensor"
)
LANES = 16  # channels are multiples of this
MOST_CHANNELS = 512
# Maps with fewer pixels are faster with PyTorch, because the kernel transforms the weights first.
# The number of maps does not count: a result must not depend on the other maps of the batch.
FEWEST_PIXELS = 14 * 14
TOLERANCE = 1e-5  # largest error that the check allows, relative to the largest value
# What the kernel computes, and how far its results are rounded, relative to the largest value.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8}


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    relu: bool = False,
) -> Tensor:
    """Compute ``conv2d(x, weight, bias, padding=1)`` and, with ``relu``, ReLU of the result.

    The compiled kernel computes maps on the CPU in channels-last order, of at least 196 pixels,
    with channels that are multiples of 16 up to 512, in float32 and, on processors without AMX, in
    bfloat16. PyTorch computes everything else: other maps, gradients, under autocast, function
    transforms and export, and without the compiled library.

    A result does not depend on the number of threads or on the other maps of the batch.

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[K, C, 3, 3]``.
        bias: ``[K]``.
        relu: replace negative results by zero.

    Returns:
        ``[N, K, H, W]``; the kernel's results are in channels-last order.
    """
    if accepts(x, weight, bias):
        return torch.ops.vitadapter_zoo.conv3x3(x, weight, bias, relu)
    return _convolve(x, weight, bias, relu)


def accepts(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether the kernel computes this convolution; see `conv3x3`.

    Raises:
        ZooError: ``VITADAPTER_ZOO_OP=compiled`` and the kernel cannot be used.
    """
    tensors = [x, weight] if bias is None else [x, weight, bias]
    if torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None:
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    if any(t.device.type != "cpu" or t.dtype != x.dtype for t in tensors) or not _pays(x.dtype):
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    # While compiling, the operator itself decides; the compiler does not look into it.
    if not torch.compiler.is_compiling() and (_transformed(tensors) or not usable()):
        return False
    return _fits(x, weight) and x.shape[2] * x.shape[3] >= FEWEST_PIXELS


def _pays(dtype: torch.dtype) -> bool:
    """Return whether the kernel is faster than PyTorch's convolution in this dtype."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and not AMX)


def _fits(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dim() == 4
        and weight.shape[1:] == (x.shape[1], 3, 3)
        and all(size % LANES == 0 and 0 < size <= MOST_CHANNELS for size in weight.shape[:2])
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _transformed(tensors: list[Tensor]) -> bool:
    """Return whether a tensor is not plain memory, or has a tangent of forward-mode autograd."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors)


def tile_size(height: int, width: int) -> int:
    """Return the side of the tiles, 4 or 2, with which a map of this size takes fewer products."""
    larger, smaller = ((tile + 2) ** 2 * -(-height // tile) * -(-width // tile) for tile in (4, 2))
    return 4 if larger < smaller else 2


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    result = F.conv2d(x, weight, bias, padding=1)
    return F.relu(result, inplace=True) if relu else result


def _compute(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in ROUNDING
    if on_cpu and _fits(x, weight) and usable():
        return _run(x, weight, bias, relu)
    return _convolve(x, weight, bias, relu).contiguous(memory_format=torch.channels_last)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    maps = x.permute(0, 2, 3, 1)
    tile = tile_size(*x.shape[2:])
    result = torch.ops.vitadapter_zoo._conv3x3_maps(maps, weight, bias, tile, relu)
    return result.permute(0, 3, 1, 2)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    sizes = (x.shape[0], weight.shape[0], *x.shape[2:])
    return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.relu = inputs
    ctx.bias_sizes = None if bias is None else list(bias.shape)
    ctx.save_for_backward(x, weight, output if ctx.relu else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, output = ctx.saved_tensors
    if ctx.relu:
        grad = torch.where(output > 0, grad, 0)
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
    ones, zeros = [1, 1], [0, 0]
    found = torch.ops.aten.convolution_backward(
        grad, x, weight, ctx.bias_sizes, ones, ones, ones, False, zeros, 1, wanted
    )
    return (*found, None)


LIBRARY.impl("conv3x3", _compute, "CompositeExplicitAutograd")
torch.library.register_fake("vitadapter_zoo::conv3x3", _fake)
torch.library.register_autograd("vitadapter_zoo::conv3x3", _backward, setup_context=_save)


def usable() -> bool:
    """Return whether the compiled kernel exists and agrees with PyTorch's convolution.

    If the other compiled operators are used but this one is not usable, there is one warning.

    Raises:
        ZooError: ``VITADAPTER_ZOO_OP=compiled`` and the kernel cannot be used.
    """
    return library.implementation(torch.device("cpu")).compiled and _works()


@functools.cache
def _works() -> bool:
    return library.kernel_agrees(
        "the convolution", "3x3 convolutions use PyTorch's, which are slower", _error, TOLERANCE
    )


def _error() -> float:
    """Return the kernel's largest relative error on small maps beyond rounding, or NaN."""
    errors = []
    for height, width, channels, outputs in ((9, 5, 48, 16), (2, 6, 16, 80)):
        count = channels * (2 * height * width + 9 * outputs)
        numbers = (torch.arange(count, dtype=torch.float64) * 0.7548776662).sin()
        values = (
            numbers[: 2 * channels * height * width].view(2, channels, height, width),
            numbers[2 * channels * height * width :].view(outputs, channels, 3, 3),
            numbers[:outputs],
        )
        for dtype, rounding in ROUNDING.items():
            x, weight, bias = (tensor.to(dtype) for tensor in values)
            right = _convolve(x.double(), weight.double(), bias.double(), relu=True)
            found = _run(x, weight, bias, relu=True)
            error = float((found - right).abs().max() / right.abs().max())
            errors.append(max(error - rounding, 0.0))  # NaN stays NaN
    return library.worst(errors)
