"""ViT-Adapter (arXiv:2205.08534, section 3): a spatial prior beside the trunk, joined by
injectors and extractors of multi-scale deformable attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from vitadapter_zoo.models.tokens import Linear, at_a_time, by_pieces
from vitadapter_zoo.models.vit import (
    LAYER_NORM_EPS,
    VisionTransformer,
    channels_last,
    tokens_to_map,
)
from vitadapter_zoo.ops import ms_deform_attn_fused

POINTS = 4  # sampling points per head and level
STEM_WIDTH = 64
CONV_FFN_RATIO = 0.25


def cell_centres(height: int, width: int, device: torch.device) -> Tensor:
    """Centres of a grid's cells, ``[height * width, 2]`` as (x, y) in 0..1, row-major, float32."""
    y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
    x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)


@dataclass(frozen=True)
class Geometry:
    """The two token sets of an image: the trunk's grid and the spatial prior's three grids.

    Attributes:
        trunk: (height, width) at stride 16.
        prior: (height, width) at strides 8, 16 and 32.
        trunk_points: reference points of the trunk's tokens, ``[H * W, 2]`` in 0..1.
        prior_points: reference points of the prior's tokens, ``[sum of H_l * W_l, 2]``.
        trunk_shapes: ``trunk`` as the operator takes it, int64 ``[1, 2]`` on the image's device.
        prior_shapes: ``prior`` likewise, ``[3, 2]``.
    """

    trunk: tuple[int, int]
    prior: list[tuple[int, int]]
    trunk_points: Tensor
    prior_points: Tensor
    trunk_shapes: Tensor
    prior_shapes: Tensor

    @classmethod
    def of(cls, image: Tensor) -> "Geometry":
        """Read the grids off an image ``[N, 3, H, W]`` whose sides are multiples of 32."""
        height, width = image.shape[2:]
        prior = [(height // stride, width // stride) for stride in (8, 16, 32)]
        points = [cell_centres(*grid, image.device) for grid in prior]
        shapes = torch.tensor(prior, device=image.device)
        return cls(prior[1], prior, points[1], torch.cat(points), shapes[1:2], shapes)


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with its projections.

    ``ratio`` is the width of the values relative to ``dim`` (0.5 in the large models).
    """

    def __init__(self, dim: int, heads: int, levels: int, ratio: float) -> None:
        super().__init__()
        self.heads = heads
        self.levels = levels
        value_dim = int(dim * ratio)
        self.sampling_offsets = Linear(dim, heads * levels * POINTS * 2)
        self.attention_weights = Linear(dim, heads * levels * POINTS)
        self.value_proj = Linear(dim, value_dim)
        self.output_proj = Linear(value_dim, dim)

    def forward(self, query: Tensor, points: Tensor, value: Tensor, shapes: Tensor) -> Tensor:
        """Attend from ``query`` ``[N, Q, dim]`` at ``points`` ``[Q, 2]`` (0..1) to ``value``.

        ``value`` is ``[N, S, width of the values]``, projected; ``shapes`` ``[levels, 2]`` its
        levels' (height, width), int64; the result is ``[N, Q, dim]``.
        """
        values = value.unflatten(-1, (self.heads, -1))
        grouped = (self.heads, self.levels, POINTS)
        offsets = self.sampling_offsets(query).unflatten(-1, (*grouped, 2))
        logits = self.attention_weights(query).unflatten(-1, grouped)
        attended = ms_deform_attn_fused(values, shapes, points, offsets, logits)
        return self.output_proj(attended)


class DWConv(nn.Module):
    """One depthwise 3x3 convolution, applied to each of the prior's three maps apart."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, tokens: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """``[N, sum of H_l * W_l, dim]`` to the same."""
        areas = [height * width for height, width in shapes]
        maps = [
            self.dwconv(tokens_to_map(part, *shape)).flatten(2).transpose(1, 2)
            for part, shape in zip(tokens.split(areas, dim=1), shapes, strict=True)
        ]
        return torch.cat(maps, dim=1)


class ConvFFN(nn.Module):
    """Feed-forward network with a depthwise convolution between its layers.

    Its steps are called apart, by the extractor: ``fc1``, ``dwconv``, ``expand``. Only the middle
    one looks at a token's neighbours.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = int(dim * CONV_FFN_RATIO)
        self.fc1 = Linear(dim, hidden)
        self.dwconv = DWConv(hidden)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden, dim)

    def expand(self, hidden: Tensor) -> Tensor:
        """``[N, L, hidden]`` to ``[N, L, dim]``."""
        return self.fc2(self.act(hidden))


class Injector(nn.Module):
    """Bring the spatial prior into the trunk (equation 1): ``x + gamma * attn(x, c)``."""

    def __init__(self, dim: int, heads: int, ratio: float, eps: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(dim))
        self.query_norm = nn.LayerNorm(dim, eps=eps)
        self.feat_norm = nn.LayerNorm(dim, eps=eps)
        self.attn = MSDeformAttn(dim, heads, levels=3, ratio=ratio)

    def forward(self, x: Tensor, c: Tensor, geometry: Geometry) -> Tensor:
        """Trunk tokens ``x`` and prior tokens ``c`` to new trunk tokens."""
        values = by_pieces(lambda c: self.attn.value_proj(self.feat_norm(c)), c)

        def inject(x: Tensor, points: Tensor) -> Tensor:
            query = self.query_norm(x)
            return x + self.gamma * self.attn(query, points[0], values, geometry.prior_shapes)

        return by_pieces(inject, x, geometry.trunk_points[None])


class Extractor(nn.Module):
    """Take the trunk's features into the prior (equations 2 and 3), then a ConvFFN."""

    def __init__(self, dim: int, heads: int, ratio: float, eps: float, drop_path: float) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=eps)
        self.feat_norm = nn.LayerNorm(dim, eps=eps)
        self.attn = MSDeformAttn(dim, heads, levels=1, ratio=ratio)
        self.ffn = ConvFFN(dim)
        self.ffn_norm = nn.LayerNorm(dim, eps=eps)
        self.drop_path = DropPath(drop_path)

    def forward(self, c: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
        """Prior tokens ``c`` and trunk tokens ``x`` to new prior tokens.

        Without gradients the new ones may lie where ``c`` was: a fresh tensor of this size costs
        more in paging than what is computed.
        """
        values = by_pieces(lambda x: self.attn.value_proj(self.feat_norm(x)), x)

        def extract(c: Tensor, points: Tensor) -> Tensor:
            query = self.query_norm(c)
            return c + self.attn(query, points[0], values, geometry.trunk_shapes)

        def feed_forward(c: Tensor, hidden: Tensor) -> Tensor:
            return c + self.drop_path(self.ffn.expand(hidden))

        c = by_pieces(extract, c, geometry.prior_points[None], out=c)
        hidden = by_pieces(lambda c: self.ffn.fc1(self.ffn_norm(c)), c)
        hidden = self.ffn.dwconv(hidden, geometry.prior)
        return by_pieces(feed_forward, c, hidden, out=c)


class InteractionBlock(nn.Module):
    """An injector, a quarter of the trunk's blocks, an extractor; at the end two more of them."""

    def __init__(
        self, dim: int, heads: int, ratio: float, eps: float, drop_path: float, *, last: bool
    ) -> None:
        super().__init__()
        self.injector = Injector(dim, heads, ratio, eps)
        self.extractor = Extractor(dim, heads, ratio, eps, drop_path)
        self.extra_extractors = nn.ModuleList(
            Extractor(dim, heads, ratio, eps, drop_path) for _ in range(2 if last else 0)
        )

    def forward(
        self, x: Tensor, c: Tensor, blocks: Sequence[nn.Module], geometry: Geometry
    ) -> tuple[Tensor, Tensor]:
        """Trunk tokens ``x`` and prior tokens ``c`` after this quarter of ``blocks``."""
        x = self.injector(x, c, geometry)
        for block in blocks:
            x = block(x, *geometry.trunk)
        c = self.extractor(c, x, geometry)
        for extractor in self.extra_extractors:
            c = extractor(c, x, geometry)
        return x, c


class Convolutions(nn.Sequential):
    """3x3 convolution + BatchNorm + ReLU for each step of ``widths``, then what ``more`` adds."""

    def __init__(
        self, *widths: int, strides: tuple[int, ...], more: tuple[nn.Module, ...] = ()
    ) -> None:
        layers: list[nn.Module] = []
        for narrow, wide, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            layers += [
                nn.Conv2d(narrow, wide, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(wide),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers, *more)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, widths[0], H, W]`` to ``[N, widths[-1], ...]``."""
        convolution = None
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                convolution = layer
            elif isinstance(layer, (nn.BatchNorm2d, nn.SyncBatchNorm)) and convolution is not None:
                x = convolve_and_normalise(x, convolution, layer)
            else:
                x = layer(x)
        return x


def convolve_and_normalise(
    x: Tensor, convolution: nn.Conv2d, norm: nn.BatchNorm2d | nn.SyncBatchNorm
) -> Tensor:
    """``norm(convolution(x))``; in evaluation one convolution with the norm's scale in it.

    The maps at stride 2 are the network's largest: one pass over them less.
    """
    if norm.training:
        return norm(convolution(x))
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    scale = norm.weight * (variance + norm.eps).rsqrt()
    weight = convolution.weight * scale[:, None, None, None]
    bias = norm.bias - mean * scale
    return F.conv2d(x, weight, bias, convolution.stride, convolution.padding)


class SpatialPrior(nn.Module):
    """A small convolutional pyramid at strides 4, 8, 16 and 32 (section 3.3)."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.stem = Convolutions(
            3, width, width, width, strides=(2, 1, 1), more=(nn.MaxPool2d(3, stride=2, padding=1),)
        )
        self.conv2 = Convolutions(width, 2 * width, strides=(2,))
        self.conv3 = Convolutions(2 * width, 4 * width, strides=(2,))
        self.conv4 = Convolutions(4 * width, 4 * width, strides=(2,))
        self.fc1 = nn.Conv2d(width, dim, 1)
        self.fc2 = nn.Conv2d(2 * width, dim, 1)
        self.fc3 = nn.Conv2d(4 * width, dim, 1)
        self.fc4 = nn.Conv2d(4 * width, dim, 1)

    def forward(self, image: Tensor) -> list[Tensor]:
        """``[N, 3, H, W]`` to four maps at strides 4, 8, 16 and 32.

        The first is ``[N, width, H / 4, W / 4]`` and still to go through ``fc1``; the others are
        ``[N, dim, H / s, W / s]``.
        """
        c1 = self.stem(channels_last(image))
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        return [c1, self.fc2(c2), self.fc3(c3), self.fc4(c4)]


class WithAdapter(nn.Module):
    """The adapter's parts, for a trunk of any kind to inherit beside its own."""

    def add_adapter(
        self,
        dim: int,
        heads: int,
        ratio: float,
        eps: float,
        drop_path: float,
        stem_width: int = STEM_WIDTH,
    ) -> None:
        """Create the parts; ``heads`` and ``ratio`` are the deformable attention's."""
        self.level_embed = nn.Parameter(torch.zeros(3, dim))
        self.spm = SpatialPrior(dim, stem_width)
        self.interactions = nn.ModuleList(
            InteractionBlock(dim, heads, ratio, eps, drop_path, last=index == 3)
            for index in range(4)
        )
        self.up = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.norm1 = nn.BatchNorm2d(dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.norm3 = nn.BatchNorm2d(dim)
        self.norm4 = nn.BatchNorm2d(dim)
        nn.init.normal_(self.level_embed)

    def adapted(self, image: Tensor, x: Tensor, blocks: nn.ModuleList) -> list[Tensor]:
        """Run the trunk's tokens ``x`` through its ``blocks`` with the adapter around them.

        Args:
            image: ``[N, 3, H, W]``, sides multiples of 32.
            x: the embedded patches, ``[N, H * W / 256, dim]``.
            blocks: called as ``block(x, height, width)``.

        Returns:
            Four maps ``[N, dim, H / s, W / s]``, s = 4, 8, 16, 32.
        """
        geometry = Geometry.of(image)
        stem, *prior = self.spm(image)
        c = torch.cat(
            [
                part.flatten(2).transpose(1, 2) + level
                for part, level in zip(prior, self.level_embed, strict=True)
            ],
            dim=1,
        )
        quarter = len(blocks) // 4
        for index, interaction in enumerate(self.interactions):
            x, c = interaction(x, c, blocks[index * quarter : (index + 1) * quarter], geometry)

        trunk = tokens_to_map(x, *geometry.trunk)
        areas = [height * width for height, width in geometry.prior]
        c2, c3, c4 = (
            tokens_to_map(part, *shape)
            for part, shape in zip(c.split(areas, dim=1), geometry.prior, strict=True)
        )
        return [
            self._finest(stem, c2, trunk),
            self.norm2(c2 + _rescaled(trunk, 2)),
            self.norm3(c3 + trunk),
            self.norm4(c4 + _rescaled(trunk, 0.5)),
        ]

    def _finest(self, stem: Tensor, c2: Tensor, trunk: Tensor) -> Tensor:
        """The map at stride 4, the network's largest: a few rows at a time where that pays.

        Not where the statistics of the whole map are wanted.
        """
        batch, dim, height, width = trunk.shape
        rows = at_a_time(trunk, batch * dim * 4 * 4 * width)
        if rows is None or rows >= height or self.norm1.training:
            return self.norm1(self.spm.fc1(stem) + self.up(c2) + _rescaled(trunk, 4))
        whole = torch.empty(
            (batch, dim, 4 * height, 4 * width),
            dtype=trunk.dtype,
            device=trunk.device,
            memory_format=torch.channels_last,
        )
        for top in range(0, height, rows):
            end = min(top + rows, height)
            above = min(top, 1)  # interpolation looks at one row more on either side
            resized = _rescaled(trunk[:, :, top - above : end + 1], 4)
            part = self.spm.fc1(stem[:, :, 4 * top : 4 * end])
            part.add_(self.up(c2[:, :, 2 * top : 2 * end]))
            part.add_(resized[:, :, 4 * above :][:, :, : 4 * (end - top)])
            whole[:, :, 4 * top : 4 * end] = self.norm1(part)
        return whole


def _rescaled(x: Tensor, scale: float) -> Tensor:
    return F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)


class ViTAdapter(VisionTransformer, WithAdapter):
    """The plain ViT trunk with the adapter around it.

    Args:
        dim, heads, windows, pretrain_grid, drop_path: the trunk's, see ``VisionTransformer``.
        deform_heads: heads of the deformable attention.
        deform_ratio: width of its values relative to ``dim``.
        stem_width: width of the spatial prior's stem.
    """

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
        super().__init__(dim, heads, windows, pretrain_grid, drop_path)
        self.add_adapter(dim, deform_heads, deform_ratio, LAYER_NORM_EPS, drop_path, stem_width)

    def forward(self, image: Tensor) -> list[Tensor]:
        """``[N, 3, H, W]``, multiples of 32, to ``[N, dim, H / s, W / s]`` for s = 4, 8, 16, 32."""
        return self.adapted(image, self.embed(image), self.blocks)
