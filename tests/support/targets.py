"""Random network inputs, and objects in them, for the losses."""

import torch
from ellipses import ellipses
from torch import Tensor

from vitadapter_zoo.images import NetworkInput

NAMES = ["loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"]


def target(boxes: list[list[float]], labels: list[int], size: tuple[int, int]) -> dict[str, Tensor]:
    corners = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    return {
        "boxes": corners,
        "labels": torch.tensor(labels, dtype=torch.int64),
        "masks": ellipses(corners, size),
    }


def prepared(height: int, width: int, seed: int = 0) -> NetworkInput:
    """Create a random network input of the given padded size with 10 columns of padding."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.zeros(1, 3, height, width)
    tensor[..., : width - 10] = torch.randn(1, 3, height, width - 10, generator=generator)
    resized = (height, width - 10)
    return NetworkInput(tensor, resized, resized, (1.0, 1.0, 1.0, 1.0))
