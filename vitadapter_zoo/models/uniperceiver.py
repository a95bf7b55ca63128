"""The ViT-Adapter backbone with a Uni-Perceiver trunk (arXiv:2112.01522).

Compared with the plain ViT trunk, parameters have other names and windows are padded differently.
"""

from functools import partial

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vitadapter_zoo.models.adapter import WithAdapter
from vitadapter_zoo.models.spatial_prior import STEM_WIDTH
from vitadapter_zoo.models.tokens import Linear, in_chunks
from vitadapter_zoo.models.vit import (
    PATCH,
    WINDOW,
    channels_last,
    drop_path_rates,
    from_windows,
    pad_to_windows,
    resized_position_embedding,
    self_attention,
    to_windows,
)

LAYER_NORM_EPS = 1e-5
FRAMES = 8  # length of the video position embedding; an image uses that of the first frame


class SelfAttention(nn.Module):
    """Multi-head self-attention, global or in 14x14 windows."""

    def __init__(self, dim: int, heads: int, windowed: bool) -> None:
        super().__init__()
        self.heads = heads
        self.windowed = windowed
        self.in_proj = Linear(dim, 3 * dim)
        self.out_proj = Linear(dim, dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Map ``[N, height * width, dim]`` to the same shape."""
        if self.windowed:
            # This pads the *input* map, so the padded tokens' keys and values are the projection's
            # bias. The plain trunk pads after the projection. The two are not interchangeable.
            padded = pad_to_windows(x.unflatten(1, (height, width)), WINDOW)
            windows = self_attention(self.in_proj(to_windows(padded, WINDOW)), self.heads)
            merged = from_windows(windows, WINDOW, x.shape[0], *padded.shape[1:3])
            attended = merged[:, :height, :width].flatten(1, 2)
        else:
            attended = self_attention(in_chunks(self.in_proj, x), self.heads)
        return in_chunks(self.out_proj, attended)


class Layer(nn.Module):
    """Pre-norm transformer block with layer scale."""

    def __init__(self, dim: int, heads: int, windowed: bool, drop_path: float) -> None:
        super().__init__()
        self.gamma_1 = nn.Parameter(torch.zeros(dim))
        self.gamma_2 = nn.Parameter(torch.zeros(dim))
        self.self_attn = SelfAttention(dim, heads, windowed)
        self.linear1 = Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.linear2 = Linear(4 * dim, dim)
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Map ``[N, height * width, dim]`` to the same shape."""
        if self.self_attn.windowed:  # rows of windows do not depend on each other
            return in_chunks(partial(self._forward, width=width), x, multiple=WINDOW * width)
        return self._forward(x, width)

    def _forward(self, x: Tensor, width: int) -> Tensor:
        attended = self.self_attn(self.norm1(x), x.shape[1] // width, width)
        x = x + self.drop_path(self.gamma_1 * attended)
        return in_chunks(self._feed_forward, x)

    def _feed_forward(self, x: Tensor) -> Tensor:
        fed = self.linear2(self.act(self.linear1(self.norm2(x))))
        return x + self.drop_path(self.gamma_2 * fed)


class PatchEmbed(nn.Module):
    """Embed 16x16 patches as tokens and add spatial and temporal position embeddings."""

    def __init__(self, dim: int, pretrain_grid: int) -> None:
        super().__init__()
        self.spatial_pos_embed = nn.Embedding(pretrain_grid**2, dim)
        self.temporal_pos_embed = nn.Embedding(FRAMES, dim)
        self.proj = nn.Conv2d(3, dim, kernel_size=PATCH, stride=PATCH)

    def forward(self, image: Tensor) -> Tensor:
        """Map images ``[N, 3, 16 H, 16 W]`` to tokens ``[N, H * W, dim]``."""
        tokens = self.proj(channels_last(image))
        height, width = tokens.shape[2:]
        space = resized_position_embedding(self.spatial_pos_embed.weight, height, width)
        return tokens.flatten(2).transpose(1, 2) + space + self.temporal_pos_embed.weight[0]


class VisualEmbed(nn.Module):
    """The patch embedding and its LayerNorm."""

    def __init__(self, dim: int, pretrain_grid: int) -> None:
        super().__init__()
        self.embeddings_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.patch_embed = PatchEmbed(dim, pretrain_grid)

    def forward(self, image: Tensor) -> Tensor:
        """Map images ``[N, 3, 16 H, 16 W]`` to tokens ``[N, H * W, dim]``."""
        return self.embeddings_norm(self.patch_embed(image))


class UniPerceiverAdapter(WithAdapter):
    """The Uni-Perceiver trunk with the adapter; the arguments are those of ``ViTAdapter``."""

    def __init__(
        self,
        dim: int,
        heads: int,
        windows: tuple[bool, ...],
        pretrain_grid: int,
        drop_path: float,
        *,
        deform_heads: int,
        deform_ratio: float,
        stem_width: int = STEM_WIDTH,
    ) -> None:
        super().__init__()
        rates = drop_path_rates(drop_path, len(windows))
        self.layers = nn.ModuleList(
            Layer(dim, heads, windowed, rate) for windowed, rate in zip(windows, rates, strict=True)
        )
        self.visual_embed = VisualEmbed(dim, pretrain_grid)
        self.add_adapter(dim, deform_heads, deform_ratio, LAYER_NORM_EPS, drop_path, stem_width)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Compute maps ``[N, dim, H / s, W / s]``, s = 4, 8, 16, 32, from images ``[N, 3, H, W]``.

        ``H`` and ``W`` are multiples of 32.
        """
        return self.adapted(image, self.visual_embed(image), self.layers)
