"""The networks' 3x3 convolutions: on the CPU they keep transformed weights for a faster kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitadapter_zoo.ops.conv3x3 import accepts, conv3x3, pack, tile_size

if TYPE_CHECKING:
    from typing_extensions import Self


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with stride 1 and padding 1.

    It computes what ``nn.Conv2d`` computes and has the same state dict. Where `conv3x3` has a
    kernel for the input, the module keeps the transformed weights until the weights change. For
    maps of at least 3 x 3 pixels they take four times the memory of the weights.
    """

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)
        # A copy of the weights, and what they are transformed to for each tile size.
        self._kept: tuple[Tensor, dict[int, Tensor]] | None = None

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """Map ``[N, in_channels, H, W]`` to ``[N, out_channels, H, W]``; ``relu`` adds a ReLU."""
        if self.training or not accepts(x, self.weight, self.bias):
            result = super().forward(x)
            return F.relu(result, inplace=True) if relu else result
        packed = None if torch.compiler.is_compiling() else self._transformed(x)
        return conv3x3(x, self.weight, self.bias, packed=packed, relu=relu)

    def _transformed(self, x: Tensor) -> Tensor:
        """Return the transformed weights for maps of the size of ``x``."""
        kept = self._kept
        # Comparing the values takes 0.4 ms for 256 channels. Tensors' version counters would miss
        # changes through `weight.data`, with which some libraries merge low-rank weights.
        if kept is None or not torch.equal(kept[0], self.weight):
            kept = self._kept = (self.weight.detach().clone(), {})
        tile = tile_size(*x.shape[2:])
        packed = kept[1].get(tile)
        if packed is None:
            packed = kept[1][tile] = pack(self.weight, tile)
        return packed

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; training frees the transformed weights."""
        if mode:
            self._kept = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:  # of .to(), .half(), .cuda(), ...
        self._kept = None
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles, without the transformed weights."""
        return self.__dict__ | {"_kept": None}
