"""The detectors' necks: they turn the backbone's four maps into the five maps of the heads."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitadapter_zoo.models.convolution import Conv3x3

WIDTH = 256


class Conv(nn.Module):
    """A 1x1 or 3x3 convolution with bias. The name ``conv`` is that in mmcv's checkpoints."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        self.conv = (
            Conv3x3(in_channels, out_channels)
            if kernel == 3
            else nn.Conv2d(in_channels, out_channels, kernel)
        )

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """Map ``[N, in_channels, H, W]`` to ``[N, out_channels, H, W]``; ``relu`` adds a ReLU."""
        if isinstance(self.conv, Conv3x3):
            return self.conv(x, relu)
        result = self.conv(x)
        return F.relu(result, inplace=True) if relu else result


class FPN(nn.Module):
    """Feature Pyramid Network (arXiv:1612.03144) on four maps of equal width."""

    def __init__(self, in_channels: int, width: int = WIDTH) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(Conv(in_channels, width, 1) for _ in range(4))
        self.fpn_convs = nn.ModuleList(Conv(width, width, 3) for _ in range(4))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Map four maps to five: ``[N, width, H / s, W / s]`` for s = 4, 8, 16, 32, 64."""
        merged = [lateral(x) for lateral, x in zip(self.lateral_convs, maps, strict=True)]
        for finer in (2, 1, 0):
            merged[finer] = add_upsampled(merged[finer], merged[finer + 1])
        levels = [conv(x) for conv, x in zip(self.fpn_convs, merged, strict=True)]
        return [*levels, F.max_pool2d(levels[-1], 1, stride=2)]


def add_upsampled(finer: Tensor, coarser: Tensor) -> Tensor:
    """Add ``coarser``, resized to the size of ``finer`` by nearest neighbours, to ``finer``.

    Without gradients, where every pixel covers 2 x 2 pixels, the sum is computed in place and the
    resized map, which is as large as the result, is never in memory.
    """
    height, width = coarser.shape[2:]
    if torch.is_grad_enabled() or finer.shape[2:] != (2 * height, 2 * width):
        return finer.add_(F.interpolate(coarser, finer.shape[2:], mode="nearest"))
    cells = finer.permute(0, 2, 3, 1).unflatten(2, (width, 2)).unflatten(1, (height, 2))
    cells.add_(coarser.permute(0, 2, 3, 1)[:, :, None, :, None])
    return finer


class ChannelMapper(nn.Module):
    """The neck of networks without FPN: a 1x1 convolution + ReLU per level, and a pooled level."""

    def __init__(self, in_channels: int, width: int = WIDTH) -> None:
        super().__init__()
        self.convs = nn.ModuleList(Conv(in_channels, width, 1) for _ in range(4))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Map four maps to five: ``[N, width, H / s, W / s]`` for s = 4, 8, 16, 32, 64."""
        levels = [conv(x, relu=True) for conv, x in zip(self.convs, maps, strict=True)]
        return [*levels, F.max_pool2d(levels[-1], 2, stride=2)]
