"""Multi-scale deformable attention directly from the outputs of the network's linear layers.

`ms_deform_attn` needs a softmax, a division and an addition first, over tensors as large as its own
input. As separate PyTorch operators they took three times as long as the sampling. The compiled
kernels include them: on the CPU for every shape, on CUDA for the shapes of the published networks.
"""

from typing import Any

import torch
from torch import Tensor

from vitadapter_zoo.ops.deform_attn import (
    LIBRARY,
    alert_nondeterministic,
    check_shapes,
    check_value,
    gradients,
    ms_deform_attn,
    register,
)
from vitadapter_zoo.ops.library import implementation
from vitadapter_zoo.ops.reference import locate

_ARGUMENTS = (
    "Tensor value, Tensor spatial_shapes, Tensor reference_points, Tensor sampling_offsets, "
    "Tensor attention_logits"
)
LIBRARY.define(f"ms_deform_attn_fused({_ARGUMENTS}) -> Tensor")
LIBRARY.define(f"_ms_deform_attn_fused({_ARGUMENTS}) -> Tensor")
LIBRARY.define(
    f"_ms_deform_attn_fused_backward(Tensor grad_output, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)"
)
# The shapes that the fused CUDA kernels are compiled for, see csrc/cuda_vector.cuh.
_CUDA_LEVELS = (1, 3, 4)
_CUDA_POINTS = 4
_MOST_ELEMENTS = 2**31 - 1


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """Compute `ms_deform_attn` at ``reference + offset / (width, height)`` with softmax weights.

    This is equation 3 of Deformable DETR (arXiv:2010.04159) with the normalisation of its appendix:
    the softmax is over all points of all levels of a head.

    Args:
        value: ``[N, S, heads, channels]``, see `ms_deform_attn`.
        spatial_shapes: ``[levels, 2]``, int64, (height, width) of every level.
        reference_points: ``[Q, 2]`` as (x, y) in 0..1, float64 if ``value`` is float64, otherwise
            float32; the same for every image, head and level.
        sampling_offsets: ``[N, Q, heads, levels, points, 2]`` in pixels of their level, in the
            dtype of ``value`` or of ``reference_points``.
        attention_logits: ``[N, Q, heads, levels, points]`` in the dtype of ``sampling_offsets``.

    Returns:
        ``[N, Q, heads * channels]`` in the dtype of ``value``.

    Raises:
        ValueError: shapes that do not fit each other, or tensors on different devices.
        TypeError: a tensor has another dtype.
    """
    check_shapes(value, spatial_shapes, sampling_offsets, attention_logits)
    if tuple(reference_points.shape) != (sampling_offsets.shape[1], 2):
        raise ValueError(
            f"reference_points must be [{sampling_offsets.shape[1]}, 2], "
            f"got {list(reference_points.shape)}"
        )
    wide = check_value(value, spatial_shapes)
    if reference_points.dtype != wide:
        raise TypeError(
            f"reference_points must be {wide} with a value of {value.dtype}, "
            f"got {reference_points.dtype}"
        )
    dtypes = (sampling_offsets.dtype, attention_logits.dtype)
    if dtypes not in ((value.dtype, value.dtype), (wide, wide)):
        raise TypeError(
            f"sampling_offsets and attention_logits must both be {value.dtype}, like value, or "
            f"{wide}; got {dtypes[0]} and {dtypes[1]}"
        )
    return torch.ops.vitadapter_zoo.ms_deform_attn_fused(
        value, spatial_shapes, reference_points, sampling_offsets, attention_logits
    )


def _fits(value: Tensor, offsets: Tensor, logits: Tensor, *, gradient: bool) -> bool:
    """Return whether this device's compiled kernel accepts these shapes and memory layouts."""
    if value.device.type == "cpu":
        return not gradient
    channels, (levels, points) = value.shape[3], offsets.shape[3:5]
    outputs = value.shape[0] * offsets.shape[1] * value.shape[2] * channels
    lanes = 4 if gradient else 16 // value.element_size()
    return (
        value.dtype != torch.float64
        and levels in _CUDA_LEVELS
        and points == _CUDA_POINTS
        and channels % lanes == 0
        and channels // lanes in (1, 2, 4, 8, 16, 32)
        and max(value.numel(), offsets.numel(), outputs) <= _MOST_ELEMENTS
        and all(_aligned(tensor) for tensor in (value, offsets, logits))
    )


def _aligned(tensor: Tensor) -> bool:
    """Return whether vectors can be loaded; the kernels copy what is not contiguous first."""
    return not tensor.is_contiguous() or tensor.data_ptr() % 16 == 0


def _compute(
    value: Tensor, shapes: Tensor, points: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    if implementation(value.device).compiled and _fits(value, offsets, logits, gradient=False):
        return torch.ops.vitadapter_zoo._ms_deform_attn_fused(
            value, shapes, points, offsets, logits
        )
    return ms_deform_attn(value, shapes, *locate(shapes, points, offsets, logits))


def _fake(value: Tensor, shapes: Tensor, points: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    return value.new_empty(value.shape[0], offsets.shape[1], value.shape[2] * value.shape[3])


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, Tensor | None, Tensor, Tensor]:
    value, shapes, points, offsets, logits = ctx.saved_tensors
    fused = implementation(value.device).compiled and not ctx.needs_input_grad[2]
    if fused and _fits(value, offsets, logits, gradient=True):
        alert_nondeterministic(value.device)
        grad_value, grad_offsets, grad_logits = (
            torch.ops.vitadapter_zoo._ms_deform_attn_fused_backward(
                grad_output, value, shapes, points, offsets, logits
            )
        )
        return grad_value, None, None, grad_offsets, grad_logits
    locations, weights = locate(shapes, points, offsets, logits)
    grad_value, grad_locations, grad_weights = gradients(
        grad_output, value, shapes, locations, weights
    )
    grad_offsets = (grad_locations / shapes.flip(-1)[:, None]).to(offsets.dtype)
    grad_points = grad_locations.sum((0, 2, 3, 4)) if ctx.needs_input_grad[2] else None
    mean = (grad_weights * weights).sum((3, 4), keepdim=True)
    grad_logits = (weights * (grad_weights - mean)).to(logits.dtype)
    return grad_value, None, grad_points, grad_offsets, grad_logits


register("ms_deform_attn_fused", _compute, _fake, _backward)
