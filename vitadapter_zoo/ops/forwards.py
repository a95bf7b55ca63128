"""Forwards of other projects' deformable attentions, computed by our operator.

Each has the parameters of the ``forward`` that it replaces and uses the module's own linear layers.
`families` says which class each belongs to.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitadapter_zoo.ops.deform_attn import ms_deform_attn, widened
from vitadapter_zoo.ops.fused import ms_deform_attn_fused


class Projected(NamedTuple):
    """The outputs of the linear layers of an attention.

    Attributes:
        value: ``[N, S, heads, channels]``.
        offsets: ``[N, Q, heads, levels, points, 2]``.
        logits: ``[N, Q, heads, levels, points]``.
    """

    value: Tensor
    offsets: Tensor
    logits: Tensor


def sampled(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Apply the operator; return the dtype that ``grid_sample`` and the weighted sum would give."""
    dtype = torch.promote_types(torch.promote_types(value.dtype, locations.dtype), weights.dtype)
    value = _computable(value)
    locations, weights = widened(value, shapes, locations, weights)
    return ms_deform_attn(value, shapes, locations, weights).to(dtype)


def _computable(value: Tensor) -> Tensor:
    """Widen float16 on the CPU, for which the operator has no kernel."""
    on_cpu = value.device.type == "cpu" and value.dtype == torch.float16
    return value.float() if on_cpu else value


def project(module: Any, query: Tensor, pixels: Tensor, padding: Tensor | None) -> Projected:
    """Apply the linear layers; pixels where ``padding`` ``[N, S]`` is True count as zero."""
    grouped = (*query.shape[:2], module.n_heads, module.n_levels, module.n_points)
    value = module.value_proj(pixels)
    if padding is not None:
        value = value.masked_fill(padding[..., None], 0.0)
    return Projected(
        value.unflatten(-1, (module.n_heads, -1)),
        module.sampling_offsets(query).view(*grouped, 2),
        module.attention_weights(query).view(grouped),
    )


def locate(references: Tensor, offsets: Tensor, shapes: Tensor) -> Tensor:
    """Compute locations in 0..1 around points or boxes (Deformable DETR, arXiv:2010.04159, A.3).

    Args:
        references: ``[N or 1, Q, levels or 1, 2]`` points (x, y), or ``[..., 4]`` boxes (x, y,
            width, height), in parts of the image.
        offsets: ``[N, Q, heads, levels, points, 2]``: in pixels from a point; from a box, in halves
            of its sides for each of the points.
        shapes: ``[levels, 2]`` as (height, width).

    Raises:
        ValueError: ``references`` are neither points nor boxes.
    """
    centres = references[:, :, None, :, None, :2]
    if references.shape[-1] == 2:
        return centres + offsets / shapes.flip(-1)[:, None]
    if references.shape[-1] == 4:
        sides = references[:, :, None, :, None, 2:]
        return centres + offsets / offsets.shape[-2] * sides * 0.5
    raise ValueError(
        f"the last dimension of reference points must be 2 or 4, got {references.shape[-1]}"
    )


def inner(
    self: Any,
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_spatial_shapes_list: list[tuple[int, int]],
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Replace the forward of transformers' ``MultiScaleDeformableAttention``.

    That module has no parameters; the modules of ten families hold one and call it with what
    `ms_deform_attn` takes.
    """
    shapes = value_spatial_shapes.to(value.device, torch.int64)
    return sampled(value, shapes, sampling_locations, attention_weights)


def mask2former(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    position_embeddings: Tensor | None = None,
    reference_points: Any = None,
    spatial_shapes_list: Any = None,
    level_start_index: Any = None,
    output_attentions: bool = False,
) -> tuple[Tensor, Tensor]:
    """Replace the forward in Mask2Former's pixel decoder, whose mask is True at padding."""
    query = hidden_states if position_embeddings is None else hidden_states + position_embeddings
    return _in_pixel_decoder(
        self, query, encoder_hidden_states, reference_points, spatial_shapes_list, attention_mask
    )


def oneformer(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    position_embeddings: Tensor | None = None,
    reference_points: Any = None,
    spatial_shapes: Any = None,
    level_start_index: Any = None,
    output_attentions: bool = False,
    spatial_shapes_list: Any = None,
) -> tuple[Tensor, Tensor]:
    """Replace the forward in OneFormer's pixel decoder, whose mask is True at padding."""
    query = hidden_states if position_embeddings is None else hidden_states + position_embeddings
    return _in_pixel_decoder(
        self, query, encoder_hidden_states, reference_points, spatial_shapes_list, attention_mask
    )


def _in_pixel_decoder(
    module: Any,
    query: Tensor,
    pixels: Tensor,
    references: Tensor,
    sizes: list[tuple[int, int]],
    padding: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the attention's output ``[N, Q, d_model]`` and its weights."""
    _check_pixels(sum(height * width for height, width in sizes), pixels)
    found = project(module, query, pixels, padding)
    weights = found.logits.flatten(3).softmax(-1).view(found.logits.shape)
    shapes = torch.tensor(
        [[height, width] for height, width in sizes], dtype=torch.int64, device=query.device
    )
    locations = locate(references, found.offsets, shapes)
    return module.output_proj(sampled(found.value, shapes, locations, weights)), weights


def authors(
    self: Any,
    query: Tensor,
    reference_points: Tensor,
    input_flatten: Tensor,
    input_spatial_shapes: Tensor,
    input_level_start_index: Tensor,
    input_padding_mask: Tensor | None = None,
) -> Tensor:
    """Replace the forward of the authors' ``MSDeformAttn``, whose mask is True at padding.

    Points that are the same for all images and levels, as an adapter has them, go to the operator
    that includes softmax and scaling.
    """
    shapes = input_spatial_shapes.to(query.device, torch.int64)
    if shapes.device.type == "cuda" and not torch.compiler.is_compiling():
        _check_pixels(int(shapes.prod(1).sum()), input_flatten)  # the operator checks on the CPU
    found = project(self, query, input_flatten, input_padding_mask)
    value = _computable(found.value)
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    references = reference_points.to(wide)
    images, _, levels, coordinates = references.shape
    if (images, levels, coordinates) == (1, 1, 2):
        offsets, logits = found.offsets.to(value.dtype), found.logits.to(value.dtype)
        attended = ms_deform_attn_fused(value, shapes, references[0, :, 0], offsets, logits)
    else:
        weights = found.logits.flatten(3).softmax(-1).view(found.logits.shape)
        attended = sampled(value, shapes, locate(references, found.offsets, shapes), weights)
    return self.output_proj(attended.to(found.value.dtype))


def _check_pixels(expected: int, pixels: Tensor) -> None:
    if expected != pixels.shape[1]:
        raise ValueError(f"the levels have {expected} pixels, but there are {pixels.shape[1]}")
