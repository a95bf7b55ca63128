"""A stand-in for the compiled extension of Deformable DETR, computed by our operator.

Deformable DETR and the projects that followed it carry a compiled extension from 2020 with two
functions, ``ms_deform_attn_forward`` and ``ms_deform_attn_backward``. Most import it as
``MultiScaleDeformableAttention``, GroundingDINO as ``groundingdino._C``. After

    import vitadapter_zoo.ops.compat
    vitadapter_zoo.ops.compat.register()

both imports find this module, which has the same two functions, for the CPU too.
"""

import sys

import torch
from torch import Tensor

from vitadapter_zoo.ops.deform_attn import LIBRARY, gradients, ms_deform_attn, widened

NAMES = ("MultiScaleDeformableAttention", "groundingdino._C")

# An operator, because torch.compile cannot look into what `gradients` calls.
LIBRARY.define(
    "_compat_backward(Tensor grad_output, Tensor value, Tensor spatial_shapes, "
    "Tensor sampling_locations, Tensor attention_weights) -> (Tensor, Tensor, Tensor)"
)


def register() -> None:
    """Make imports of the extension find this module in this process.

    The package ``groundingdino`` itself has to be installed or on the path; only its ``_C`` is
    replaced.

    Raises:
        RuntimeError: the extension has been imported already, and code may hold it.
    """
    module = sys.modules[__name__]
    for name in NAMES:
        if sys.modules.get(name, module) is not module:
            raise RuntimeError(f"{name} has been imported already; call register() before that")
    for name in NAMES:
        sys.modules[name] = module


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
    found = torch.ops.vitadapter_zoo._compat_backward(
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
    # Compared on the CPU alone, where it does not have to wait for a device, and not while
    # torch.compile or torch.export trace, when a tensor has no values.
    if starts.device.type == "cpu" and not torch.compiler.is_compiling():
        areas = shapes.cpu().prod(1)
        expected = areas.cumsum(0) - areas
        if starts.tolist() != expected.tolist():
            raise ValueError(
                f"level_start_index is {starts.tolist()}, but the levels start at "
                f"{expected.tolist()}"
            )
    return value, shapes, *widened(value, shapes, locations, weights)


def _fake_backward(
    grad_output: Tensor, value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(value), torch.empty_like(locations), torch.empty_like(weights)


LIBRARY.impl("_compat_backward", gradients, "CompositeExplicitAutograd")
torch.library.register_fake("vitadapter_zoo::_compat_backward", _fake_backward)
