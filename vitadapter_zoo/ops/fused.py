"""Multi-scale deformable attention from what the network's linear layers give.

Between those layers and `ms_deform_attn` lie a softmax, a division and an addition over tensors as
large as its own input; composed of PyTorch's operators they took three times as long as the
sampling. On the CPU the compiled kernel does them on the way.
"""

from typing import Any

import torch
from torch import Tensor

from vitadapter_zoo.ops.deform_attn import (
    LIBRARY,
    check_shapes,
    check_value,
    gradients,
    ms_deform_attn,
)
from vitadapter_zoo.ops.library import implementation

_ARGUMENTS = (
    "Tensor value, Tensor spatial_shapes, Tensor reference_points, Tensor sampling_offsets, "
    "Tensor attention_logits"
)
LIBRARY.define(f"ms_deform_attn_fused({_ARGUMENTS}) -> Tensor")
LIBRARY.define(f"_ms_deform_attn_fused({_ARGUMENTS}) -> Tensor")


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """`ms_deform_attn` at ``reference + offset / (width, height)`` with softmaxed weights.

    Equation 3 of Deformable DETR (arXiv:2010.04159) with its appendix's normalisation: the softmax
    goes over all points of all levels of a head.

    Args:
        value: ``[N, S, heads, channels]``, see `ms_deform_attn`.
        spatial_shapes: ``[levels, 2]``, int64, (height, width) of every level.
        reference_points: ``[Q, 2]`` as (x, y) in 0..1, float64 with values of float64 and else
            float32; the same for every image, head and level.
        sampling_offsets: ``[N, Q, heads, levels, points, 2]`` in pixels of their level, in the
            dtype of ``value`` or of ``reference_points``.
        attention_logits: ``[N, Q, heads, levels, points]`` in the dtype of ``sampling_offsets``.

    Returns:
        ``[N, Q, heads * channels]`` in the dtype of ``value``.

    Raises:
        ValueError: shapes that do not fit each other, or tensors on different devices.
        TypeError: a dtype other than these.
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


def locate(
    shapes: Tensor, points: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Sampling locations and attention weights in the dtype of ``points``."""
    sizes = shapes.flip(-1).to(points.dtype)  # (width, height), as locations are (x, y)
    locations = points[:, None, None, None] + offsets.to(points.dtype) / sizes[:, None]
    weights = logits.to(points.dtype).flatten(3).softmax(-1).view(logits.shape)
    return locations, weights


def _compute(
    value: Tensor, shapes: Tensor, points: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    if value.device.type == "cpu" and implementation("cpu").compiled:
        return torch.ops.vitadapter_zoo._ms_deform_attn_fused(
            value, shapes, points, offsets, logits
        )
    return ms_deform_attn(value, shapes, *locate(shapes, points, offsets, logits))


def _fake(value: Tensor, shapes: Tensor, points: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    return value.new_empty(value.shape[0], offsets.shape[1], value.shape[2] * value.shape[3])


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, Tensor | None, Tensor, Tensor]:
    if torch.is_grad_enabled():  # create_graph=True, which would end in silently missing terms
        raise NotImplementedError("ms_deform_attn_fused has no second derivatives")
    value, shapes, points, offsets, logits = ctx.saved_tensors
    locations, weights = locate(shapes, points, offsets, logits)
    grad_value, grad_locations, grad_weights = gradients(
        grad_output, value, shapes, locations, weights
    )
    grad_offsets = (grad_locations / shapes.flip(-1)[:, None]).to(offsets.dtype)
    grad_points = grad_locations.sum((0, 2, 3, 4)) if ctx.needs_input_grad[2] else None
    mean = (grad_weights * weights).sum((3, 4), keepdim=True)
    grad_logits = weights * (grad_weights - mean)
    return (
        grad_value,
        None,
        grad_points,
        grad_offsets.to(offsets.dtype),
        grad_logits.to(logits.dtype),
    )


def _refuse_vmap(info: Any, in_dims: Any, *arguments: Tensor) -> Any:
    raise NotImplementedError(
        "ms_deform_attn_fused does not go through vmap; give it the batch as the first dimension"
    )


_NAME = "vitadapter_zoo::ms_deform_attn_fused"
LIBRARY.impl("ms_deform_attn_fused", _compute, "CompositeExplicitAutograd")
torch.library.register_fake(_NAME, _fake)
torch.library.register_autograd(_NAME, _backward, setup_context=_save)
torch.library.register_vmap(_NAME, _refuse_vmap)
