"""Initial random weights, drawn from the original's distributions."""

import math

import torch
from torch import Tensor, nn

from vitadapter_zoo.models.adapter import MSDeformAttn


def draw(network: nn.Module) -> None:
    """Draw the weights of a backbone's layers, or of a part of it, in place."""
    with torch.no_grad():
        network.apply(_draw_layer)
        network.apply(_draw_sampling)


def _draw_layer(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _draw_sampling(module: nn.Module) -> None:
    """Initialise as Deformable DETR (arXiv:2010.04159) does: a sampling direction per head."""
    if not isinstance(module, MSDeformAttn):
        return
    angles = torch.arange(module.heads) * (2 * math.pi / module.heads)
    directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
    directions = directions / directions.abs().amax(dim=-1, keepdim=True)
    offsets: Tensor = module.sampling_offsets.bias
    points = offsets.numel() // (2 * module.heads * module.levels)
    steps = torch.arange(1, points + 1)[:, None]
    grid = directions[:, None, None] * steps  # [heads, 1, points, 2]
    offsets.copy_(grid.expand(-1, module.levels, -1, -1).flatten())
    nn.init.zeros_(module.sampling_offsets.weight)
    for zeroed in (module.attention_weights.weight, module.attention_weights.bias):
        nn.init.zeros_(zeroed)
    for projection in (module.value_proj, module.output_proj):
        nn.init.xavier_uniform_(projection.weight)
        nn.init.zeros_(projection.bias)
