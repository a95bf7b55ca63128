"""The ViT-Adapter backbone (arXiv:2205.08534, section 3).

The trunk is a ViT. Beside it a small convolutional network, the spatial prior, computes features at
strides 8, 16 and 32. Injectors and extractors exchange features between the two by multi-scale
deformable attention.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from vitadapter_zoo.models.constants import kept
from vitadapter_zoo.models.pyramid import Pyramid
from vitadapter_zoo.models.spatial_prior import STEM_WIDTH, SpatialPrior
from vitadapter_zoo.models.tokens import Linear, in_chunks, items_per_chunk
from vitadapter_zoo.models.vit import tokens_to_map
from vitadapter_zoo.ops import ms_deform_attn_fused

POINTS = 4  # sampling points per head and level
CONV_FFN_RATIO = 0.25


def cell_centres(height: int, width: int, device: torch.device) -> Tensor:
    """Return the centres of a grid's cells: ``[height * width, 2]``, (x, y) in 0..1, row-major."""
    y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
    x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)


@dataclass(frozen=True)
class Geometry:
    """The grids of an image's tokens: one for the trunk and three for the spatial prior.

    Attributes:
        trunk: (height, width) at stride 16.
        prior: (height, width) at strides 8, 16 and 32.
        trunk_points: reference points of the trunk's tokens, ``[H * W, 2]`` in 0..1, float32.
        prior_points: reference points of the prior's tokens, ``[sum of H_l * W_l, 2]``, float32.
        trunk_shapes: ``trunk`` as an int64 tensor ``[1, 2]`` on the image's device.
        prior_shapes: ``prior`` as an int64 tensor ``[3, 2]`` on the image's device.
    """

    trunk: tuple[int, int]
    prior: list[tuple[int, int]]
    trunk_points: Tensor
    prior_points: Tensor
    trunk_shapes: Tensor
    prior_shapes: Tensor

    @classmethod
    def of(cls, image: Tensor) -> "Geometry":
        """Compute the grids for images ``[N, 3, H, W]`` whose sides are multiples of 32."""
        return _geometry(image.shape[2], image.shape[3], image.device)


@kept(8)
def _geometry(height: int, width: int, device: torch.device) -> Geometry:
    prior = [(height // stride, width // stride) for stride in (8, 16, 32)]
    points = [cell_centres(*grid, device) for grid in prior]
    shapes = torch.tensor(prior, device=device)
    return Geometry(prior[1], prior, points[1], torch.cat(points), shapes[1:2], shapes)


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with its linear projections.

    ``ratio`` is the width of the values relative to ``dim``. It is 0.5 in the large models.
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
        """Attend from the queries to the values.

        Args:
            query: ``[N, Q, dim]``.
            points: the queries' reference points, ``[Q, 2]`` in 0..1.
            value: ``[N, S, width of the values]``, the output of ``value_proj``.
            shapes: (height, width) of the levels of ``value``, int64 ``[levels, 2]``.

        Returns:
            ``[N, Q, dim]``.
        """
        values = value.unflatten(-1, (self.heads, -1))
        grouped = (self.heads, self.levels, POINTS)
        offsets = self.sampling_offsets(query).unflatten(-1, (*grouped, 2))
        logits = self.attention_weights(query).unflatten(-1, grouped)
        attended = ms_deform_attn_fused(values, shapes, points, offsets, logits)
        return self.output_proj(attended)


class DWConv(nn.Module):
    """One depthwise 3x3 convolution, applied to each of the prior's three maps separately."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, tokens: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """Convolve tokens ``[N, sum of H_l * W_l, dim]``; the shape stays the same."""
        areas = [height * width for height, width in shapes]
        maps = [
            self.dwconv(tokens_to_map(part, *shape)).flatten(2).transpose(1, 2)
            for part, shape in zip(tokens.split(areas, dim=1), shapes, strict=True)
        ]
        return torch.cat(maps, dim=1)


class ConvFFN(nn.Module):
    """Feed-forward network with a depthwise convolution between its layers.

    The extractor calls the steps ``fc1``, ``dwconv`` and ``expand`` separately. Only ``dwconv``
    reads a token's neighbours, so only the other two can run on chunks of tokens.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = int(dim * CONV_FFN_RATIO)
        self.fc1 = Linear(dim, hidden)
        self.dwconv = DWConv(hidden)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden, dim)

    def expand(self, hidden: Tensor) -> Tensor:
        """Apply GELU and the last layer: ``[N, L, hidden]`` to ``[N, L, dim]``."""
        return self.fc2(self.act(hidden))


class Injector(nn.Module):
    """Add features of the spatial prior to the trunk (equation 1): ``x + gamma * attn(x, c)``."""

    def __init__(self, dim: int, heads: int, ratio: float, eps: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(dim))
        self.query_norm = nn.LayerNorm(dim, eps=eps)
        self.feat_norm = nn.LayerNorm(dim, eps=eps)
        self.attn = MSDeformAttn(dim, heads, levels=3, ratio=ratio)

    def forward(self, x: Tensor, c: Tensor, geometry: Geometry) -> Tensor:
        """Compute new trunk tokens from trunk tokens ``x`` and prior tokens ``c``."""
        values = in_chunks(lambda c: self.attn.value_proj(self.feat_norm(c)), c)

        def inject(x: Tensor, points: Tensor) -> Tensor:
            query = self.query_norm(x)
            return x + self.gamma * self.attn(query, points[0], values, geometry.prior_shapes)

        return in_chunks(inject, x, geometry.trunk_points[None])


class Extractor(nn.Module):
    """Add the trunk's features to the prior (equations 2 and 3), then apply a ConvFFN."""

    def __init__(self, dim: int, heads: int, ratio: float, eps: float, drop_path: float) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=eps)
        self.feat_norm = nn.LayerNorm(dim, eps=eps)
        self.attn = MSDeformAttn(dim, heads, levels=1, ratio=ratio)
        self.ffn = ConvFFN(dim)
        self.ffn_norm = nn.LayerNorm(dim, eps=eps)
        self.drop_path = DropPath(drop_path)

    def forward(self, c: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
        """Compute new prior tokens from prior tokens ``c`` and trunk tokens ``x``.

        Without gradients the result may overwrite ``c``. Allocating a new tensor of this size
        takes longer than the computation, because the system has to map its pages.
        """
        values = in_chunks(lambda x: self.attn.value_proj(self.feat_norm(x)), x)

        def extract(c: Tensor, points: Tensor) -> Tensor:
            query = self.query_norm(c)
            return c + self.attn(query, points[0], values, geometry.trunk_shapes)

        def feed_forward(c: Tensor, hidden: Tensor) -> Tensor:
            return c + self.drop_path(self.ffn.expand(hidden))

        c = in_chunks(extract, c, geometry.prior_points[None], out=c)
        hidden = in_chunks(lambda c: self.ffn.fc1(self.ffn_norm(c)), c)
        hidden = self.ffn.dwconv(hidden, geometry.prior)
        return in_chunks(feed_forward, c, hidden, out=c)


class InteractionBlock(nn.Module):
    """An injector, a quarter of the trunk's blocks and an extractor.

    The last interaction block has two more extractors. DINOv3's arrangement has no injectors.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        ratio: float,
        eps: float,
        drop_path: float,
        *,
        last: bool,
        injects: bool = True,
    ) -> None:
        super().__init__()
        self.injector = Injector(dim, heads, ratio, eps) if injects else None
        self.extractor = Extractor(dim, heads, ratio, eps, drop_path)
        self.extra_extractors = nn.ModuleList(
            Extractor(dim, heads, ratio, eps, drop_path) for _ in range(2 if last else 0)
        )

    def forward(
        self, x: Tensor, c: Tensor, blocks: Sequence[nn.Module], geometry: Geometry
    ) -> tuple[Tensor, Tensor]:
        """Run a quarter of the trunk, ``blocks``; return new trunk tokens and prior tokens."""
        if self.injector is not None:
            x = self.injector(x, c, geometry)
        for block in blocks:
            x = block(x, *geometry.trunk)
        return x, self.extract(c, x, geometry)

    def extract(self, c: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
        """Run the extractors only; return new prior tokens."""
        c = self.extractor(c, x, geometry)
        for extractor in self.extra_extractors:
            c = extractor(c, x, geometry)
        return c


class WithAdapter(Pyramid, nn.Module):
    """Mixin with the adapter's layers and its forward pass, for any kind of trunk."""

    def add_adapter(
        self,
        dim: int,
        heads: int,
        ratio: float,
        eps: float,
        drop_path: float,
        stem_width: int = STEM_WIDTH,
        *,
        injects: bool = True,
    ) -> None:
        """Create the layers; ``heads`` and ``ratio`` configure the deformable attention."""
        self.width = dim
        self.level_embed = nn.Parameter(torch.zeros(3, dim))
        self.spm = SpatialPrior(dim, stem_width)
        self.interactions = nn.ModuleList(
            InteractionBlock(dim, heads, ratio, eps, drop_path, last=index == 3, injects=injects)
            for index in range(4)
        )
        self.up = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.norm1 = nn.BatchNorm2d(dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.norm3 = nn.BatchNorm2d(dim)
        self.norm4 = nn.BatchNorm2d(dim)
        nn.init.normal_(self.level_embed)

    def adapted(self, image: Tensor, x: Tensor, blocks: nn.ModuleList) -> list[Tensor]:
        """Run the trunk's ``blocks`` on its tokens ``x`` together with the adapter.

        Args:
            image: ``[N, 3, H, W]``, sides multiples of 32.
            x: the embedded patches, ``[N, H * W / 256, dim]``.
            blocks: the trunk's blocks, called as ``block(x, height, width)``.

        Returns:
            Four maps ``[N, dim, H / s, W / s]``, s = 4, 8, 16, 32.
        """
        geometry = Geometry.of(image)
        stem, c = self.prior_tokens(image)
        quarter = len(blocks) // 4
        for index, interaction in enumerate(self.interactions):
            x, c = interaction(x, c, blocks[index * quarter : (index + 1) * quarter], geometry)
        return self.pyramid(stem, c, [tokens_to_map(x, *geometry.trunk)] * 4, geometry)

    def prior_tokens(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the stem's map at stride 4 and the tokens of the three coarser prior maps."""
        stem, *prior = self.spm(image)
        tokens = [
            part.flatten(2).transpose(1, 2) + level
            for part, level in zip(prior, self.level_embed, strict=True)
        ]
        return stem, torch.cat(tokens, dim=1)

    def pyramid(
        self, stem: Tensor, c: Tensor, trunks: Sequence[Tensor], geometry: Geometry
    ) -> list[Tensor]:
        """Compute the outputs from the prior tokens ``c`` and the trunk's maps.

        Args:
            stem: the stem's map at stride 4.
            c: ``[N, sum of H_l * W_l, dim]``.
            trunks: for each output, the map at stride 16 that is resized and added to it.
            geometry: the grids.

        Returns:
            Those of ``out_indices`` among four maps ``[N, dim, H / s, W / s]``, s = 4, 8, 16, 32.
        """
        areas = [height * width for height, width in geometry.prior]
        c2, c3, c4 = (
            tokens_to_map(part, *shape)
            for part, shape in zip(c.split(areas, dim=1), geometry.prior, strict=True)
        )
        compute: tuple[Callable[[], Tensor], ...] = (
            lambda: self._stride_4_map(stem, c2, trunks[0]),
            lambda: self.norm2(c2 + _rescaled(trunks[1], 2)),
            lambda: self.norm3(c3 + trunks[2]),
            lambda: self.norm4(c4 + _rescaled(trunks[3], 0.5)),
        )
        return [compute[index]() for index in self.out_indices]

    def _stride_4_map(self, stem: Tensor, c2: Tensor, trunk: Tensor) -> Tensor:
        """Compute the map at stride 4, a few rows at a time where that is faster.

        It is the largest output. In training mode it is computed at once, because ``norm1`` needs
        the statistics of the whole map.
        """
        batch, dim, height, width = trunk.shape
        rows = items_per_chunk(trunk, batch * dim * 4 * 4 * width)
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
            above = min(top, 1)  # interpolation reads one more row on either side
            resized = _rescaled(trunk[:, :, top - above : end + 1], 4)
            part = self.spm.fc1(stem[:, :, 4 * top : 4 * end])
            part.add_(self.up(c2[:, :, 2 * top : 2 * end]))
            part.add_(resized[:, :, 4 * above :][:, :, : 4 * (end - top)])
            whole[:, :, 4 * top : 4 * end] = self.norm1(part)
        return whole


def _rescaled(x: Tensor, scale: float) -> Tensor:
    return F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
