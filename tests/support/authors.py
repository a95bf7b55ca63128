"""A deformable attention in the form in which its authors and their followers publish it.

Names, signature and layers are those of ``MSDeformAttn`` in Deformable DETR, Mask2Former, DINOv2
and DINOv3; the code is our own. As in DINOv3, the forward pass always computes by ``grid_sample``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def by_grid_sample(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    total = value.new_zeros(batch * heads, channels, queries)
    start = 0
    for level, (height, width) in enumerate(shapes.tolist()):
        pixels = value[:, start : start + height * width].permute(0, 2, 3, 1)
        start += height * width
        image = pixels.reshape(batch * heads, channels, height, width)
        grid = locations[:, :, :, level].transpose(1, 2).flatten(0, 1) * 2 - 1
        share = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)
        total = total + (F.grid_sample(image, grid, align_corners=False) * share[:, None]).sum(-1)
    return total.view(batch, heads * channels, queries).transpose(1, 2)


class MSDeformAttn(nn.Module):
    def __init__(
        self,
        d_model: int = 64,
        n_levels: int = 3,
        n_heads: int = 4,
        n_points: int = 4,
        ratio: float = 1.0,
    ) -> None:
        super().__init__()
        self.im2col_step = 64
        self.d_model = d_model
        self.n_levels = n_levels
        self.n_heads = n_heads
        self.n_points = n_points
        self.ratio = ratio
        inside = int(d_model * ratio)
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, inside)
        self.output_proj = nn.Linear(inside, d_model)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Tensor,
        input_level_start_index: Tensor,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        batch, queries, _ = query.shape
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            value = value.masked_fill(input_padding_mask[..., None], 0.0)
        value = value.view(batch, input_flatten.shape[1], self.n_heads, -1)
        grouped = (batch, queries, self.n_heads, self.n_levels, self.n_points)
        offsets = self.sampling_offsets(query).view(*grouped, 2)
        weights = self.attention_weights(query).view(batch, queries, self.n_heads, -1)
        weights = weights.softmax(-1).view(grouped)
        around = reference_points[:, :, None, :, None]
        if reference_points.shape[-1] == 2:
            sizes = torch.stack((input_spatial_shapes[:, 1], input_spatial_shapes[:, 0]), -1)
            locations = around + offsets / sizes[None, None, None, :, None]
        else:
            locations = around[..., :2] + offsets / self.n_points * around[..., 2:] * 0.5
        dtype = torch.promote_types(value.dtype, locations.dtype)
        sampled = by_grid_sample(
            value.to(dtype), input_spatial_shapes, locations.to(dtype), weights.to(dtype)
        )
        return self.output_proj(sampled.to(value.dtype))
