"""The networks' 3x3 convolutions: on the CPU they keep transformed weights for a faster kernel."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitadapter_zoo.ops.conv3x3 import accepts, conv3x3, pack, tile_size

# Maps with fewer pixels are faster with PyTorch: the kernel reads four times as many weights.
FEWEST_PIXELS = 14 * 14


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with stride 1 and padding 1.

    It computes what ``nn.Conv2d`` computes and has the same state dict. Where `conv3x3` has a
    kernel, the transformed weights (four times the size of the weights) are kept from the second
    call on the same device until the weights change.
    """

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)
        self._packed: dict[int, Tensor] = {}  # by tile size
        self._original: Tensor | None = None  # the weights that they come from

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """Map ``[N, in_channels, H, W]`` to ``[N, out_channels, H, W]``; ``relu`` adds a ReLU."""
        worthwhile = not self.training and is_worthwhile(x)
        if not (worthwhile and accepts(x, self.weight, self.bias)):
            result = super().forward(x)
            return F.relu(result, inplace=True) if relu else result
        packed = None if torch.compiler.is_compiling() else self._transformed(x)
        return conv3x3(x, self.weight, self.bias, packed=packed, relu=relu)

    def _transformed(self, x: Tensor) -> Tensor:
        """Return the transformed weights for maps of the size of ``x``."""
        # Comparing the values takes 0.4 ms for 256 channels. Tensors' version counters would miss
        # changes through `weight.data`, with which some libraries merge low-rank weights.
        if self._original is None or not torch.equal(self._original, self.weight):
            self._packed = {}
            self._original = self.weight.detach().clone()
        tile = tile_size(*x.shape[2:])
        if tile not in self._packed:
            self._packed[tile] = pack(self.weight, tile)
        return self._packed[tile]

    def forget(self) -> None:
        """Free the transformed weights."""
        self._packed, self._original = {}, None

    def train(self, mode: bool = True) -> "Conv3x3":
        """Set training or evaluation mode; training frees the transformed weights."""
        if mode:
            self.forget()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> "Conv3x3":  # of .to(), .half(), .cuda(), ...
        self.forget()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles, without the transformed weights."""
        return self.__dict__ | {"_packed": {}, "_original": None}


def is_worthwhile(x: Tensor) -> bool:
    """Return whether `conv3x3` is faster than PyTorch for maps of this size, as measured."""
    return x.shape[-2] * x.shape[-1] >= FEWEST_PIXELS
