"""The networks' 3x3 convolutions, which have a faster kernel on the CPU."""

import torch.nn.functional as F
from torch import Tensor, nn

from vitadapter_zoo.ops.conv3x3 import conv3x3


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with stride 1 and padding 1.

    It computes what ``nn.Conv2d`` computes and has the same state dict.
    """

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """Map ``[N, in_channels, H, W]`` to ``[N, out_channels, H, W]``; ``relu`` adds a ReLU."""
        if not self.training:
            return conv3x3(x, self.weight, self.bias, relu=relu)
        result = super().forward(x)
        return F.relu(result, inplace=True) if relu else result
