"""Masks of objects with a known shape."""

import torch
from torch import Tensor


def ellipses(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Draw the ellipses inscribed in ``boxes`` as masks ``[n, *size]``."""
    y = torch.arange(size[0])[:, None] + 0.5
    x = torch.arange(size[1])[None] + 0.5
    x1, y1, x2, y2 = (side[:, None, None] for side in boxes.unbind(1))
    across = (x - (x1 + x2) / 2) / ((x2 - x1) / 2)
    down = (y - (y1 + y2) / 2) / ((y2 - y1) / 2)
    return across**2 + down**2 <= 1
