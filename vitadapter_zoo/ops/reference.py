"""Multi-scale deformable attention written with PyTorch's own operators, for any device.

It replaces the compiled kernels where they are missing, and is the reference in their checks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def ms_deform_attn(
    value: Tensor, spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Compute the same as `vitadapter_zoo.ops.ms_deform_attn`, 10 to 60 times slower on a CPU.

    Arguments and result are the same. Autograd can differentiate it.
    """
    batch, _, heads, channels = value.shape
    queries, levels, points = sampling_locations.shape[1], *sampling_locations.shape[3:5]
    shapes = [(height, width) for height, width in spatial_shapes.tolist()]

    # grid_sample takes [N * heads, channels, H, W] and a grid in -1..1 of the same dtype. Values of
    # half precision are converted to the locations' dtype, which is more precise.
    dtype = sampling_locations.dtype
    per_head = value.to(dtype).permute(0, 2, 3, 1).reshape(batch * heads, channels, -1)
    # -1 and 2 are outside of every level, so locations that are NaN or infinite sample zeros.
    bounded = sampling_locations.nan_to_num(nan=-1.0).clamp(-1, 2)
    grid = (2 * bounded - 1).transpose(1, 2).flatten(0, 1)
    areas = [height * width for height, width in shapes]
    sampled = [
        F.grid_sample(
            level.unflatten(-1, shape), grid[:, :, index], padding_mode="zeros", align_corners=False
        )
        for index, (level, shape) in enumerate(
            zip(per_head.split(areas, dim=-1), shapes, strict=True)
        )
    ]
    weights = attention_weights.to(dtype).transpose(1, 2)
    weights = weights.reshape(batch * heads, 1, queries, levels * points)
    result = (torch.stack(sampled, dim=-2).flatten(-2) * weights).sum(-1)
    result = result.reshape(batch, heads * channels, queries).transpose(1, 2).to(value.dtype)
    return result.contiguous()  # tracing expects the strides of the compiled operator's output


def locate(
    shapes: Tensor, points: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute sampling locations and attention weights in the dtype of ``points``."""
    sizes = shapes.flip(-1).to(points.dtype)  # (width, height), because locations are (x, y)
    locations = points[:, None, None, None] + offsets.to(points.dtype) / sizes[:, None]
    weights = logits.to(points.dtype).flatten(3).softmax(-1).view(logits.shape)
    return locations, weights


def ms_deform_attn_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of value, locations and weights for ``grad_output`` by autograd."""
    with torch.enable_grad():
        inputs = [
            tensor.detach().requires_grad_()
            for tensor in (value, sampling_locations, attention_weights)
        ]
        output = ms_deform_attn(inputs[0], spatial_shapes, inputs[1], inputs[2])
        grad_value, grad_locations, grad_weights = torch.autograd.grad(output, inputs, grad_output)
    return grad_value, grad_locations, grad_weights
