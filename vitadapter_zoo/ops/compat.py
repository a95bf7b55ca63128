"""The module that Deformable DETR's extension was, on our operator.

Deformable DETR, Mask2Former, GroundingDINO, DINOv3 and others each carry a copy of one extension
from 2020, ``MultiScaleDeformableAttention``, and a Python file that imports it. After

    import vitadapter_zoo.ops.compat
    vitadapter_zoo.ops.compat.register()

that import finds this module, and their code runs as it is, on the CPU too.
"""

import sys

import torch
from torch import Tensor

from vitadapter_zoo.ops.deform_attn import gradients, ms_deform_attn, widened

NAME = "MultiScaleDeformableAttention"


def register() -> None:
    """Make ``import MultiScaleDeformableAttention`` find this module in this process.

    Raises:
        RuntimeError: another module of that name has been imported already, and code may hold it.
    """
    module = sys.modules[__name__]
    if sys.modules.setdefault(NAME, module) is not module:
        raise RuntimeError(f"{NAME} has been imported already; call register() before that")


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """`vitadapter_zoo.ops.ms_deform_attn` with the arguments of the extension.

    Args:
        value: see there, as are the arguments without a description.
        spatial_shapes: any integer dtype, on any device.
        level_start_index: ``[levels]``, the first pixel of each level; the levels must follow one
            another without gaps.
        sampling_locations: of any floating-point dtype; what is narrower than float32 was rounded
            by the caller and is widened.
        attention_weights: likewise.
        im2col_step: how many images the extension took at a time; any number will do.

    Raises:
        ValueError: levels that do not follow one another, or what ``ms_deform_attn`` refuses.
    """
    return ms_deform_attn(
        *_arguments(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    )


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    im2col_step: int,
) -> list[Tensor]:
    """The gradients of value, locations and weights, each in the dtype of its tensor.

    ``grad_output`` is ``[N, Q, heads * channels]``; for the rest see `ms_deform_attn_forward`.
    """
    found = gradients(
        grad_output.to(value.dtype),
        *_arguments(
            value, spatial_shapes, level_start_index, sampling_locations, attention_weights
        ),
    )
    of = (value, sampling_locations, attention_weights)
    return [grad.to(tensor.dtype) for grad, tensor in zip(found, of, strict=True)]


def _arguments(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = shapes.to(device=value.device, dtype=torch.int64)
    # Compared on the CPU alone, where it does not have to wait for a device.
    if starts.device.type == "cpu":
        areas = shapes.cpu().prod(1)
        expected = areas.cumsum(0) - areas
        if starts.tolist() != expected.tolist():
            raise ValueError(
                f"level_start_index is {starts.tolist()}, but the levels start at "
                f"{expected.tolist()}"
            )
    return value, shapes, *widened(value, shapes, locations, weights)
