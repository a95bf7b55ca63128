"""Multi-scale deformable attention (Deformable DETR, arXiv:2010.04159, section 4.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sample every level bilinearly at the given places and add up what was found.

    ``result[n, q, h] = sum over l, p of weights[n, q, h, l, p] *
    bilinear(value_l[n, :, h], locations[n, q, h, l, p])`` (equation 3 of the paper). A location
    (x, y) in 0..1 lies at pixel ``(x * width - 0.5, y * height - 0.5)``; corners outside the map
    count as zero.

    Args:
        value: ``[N, S, heads, channels]``, the levels' pixels in row-major order, one level after
            the other.
        spatial_shapes: (height, width) of every level; their areas add up to ``S``.
        sampling_locations: ``[N, Q, heads, levels, points, 2]`` as (x, y), float32 or wider
            whatever the dtype of ``value``: rounded to bfloat16 near 1.0 they would miss by up
            to a third of a pixel.
        attention_weights: ``[N, Q, heads, levels, points]``.

    Returns:
        ``[N, Q, heads * channels]`` in the dtype of ``value``.

    Raises:
        ValueError: the levels' areas do not add up to ``S``, or the ranks do not fit.
    """
    if value.dim() != 4 or sampling_locations.dim() != 6 or attention_weights.dim() != 5:
        raise ValueError(
            "ms_deform_attn takes value [N, S, heads, channels], sampling_locations "
            "[N, Q, heads, levels, points, 2] and attention_weights [N, Q, heads, levels, points]; "
            f"got {list(value.shape)}, {list(sampling_locations.shape)} and "
            f"{list(attention_weights.shape)}"
        )
    batch, pixels, heads, channels = value.shape
    if sum(height * width for height, width in spatial_shapes) != pixels:
        raise ValueError(
            f"the levels {spatial_shapes} do not add up to the {pixels} pixels of value"
        )
    queries, levels, points = sampling_locations.shape[1], *sampling_locations.shape[3:5]

    # grid_sample wants [N * heads, channels, H, W] and a grid in -1..1 of the value's dtype, so
    # half precision is sampled in the locations' own, wider dtype.
    dtype = sampling_locations.dtype
    per_head = value.to(dtype).permute(0, 2, 3, 1).reshape(batch * heads, channels, pixels)
    grid = (2 * sampling_locations - 1).transpose(1, 2).flatten(0, 1)
    areas = [height * width for height, width in spatial_shapes]
    sampled = [
        F.grid_sample(
            level.unflatten(-1, shape), grid[:, :, index], padding_mode="zeros", align_corners=False
        )
        for index, (level, shape) in enumerate(
            zip(per_head.split(areas, dim=-1), spatial_shapes, strict=True)
        )
    ]
    weights = attention_weights.to(dtype).transpose(1, 2)
    weights = weights.reshape(batch * heads, 1, queries, levels * points)
    result = (torch.stack(sampled, dim=-2).flatten(-2) * weights).sum(-1)
    return result.reshape(batch, heads * channels, queries).transpose(1, 2).to(value.dtype)
