"""The adapter as DINOv3's authors arrange it (arXiv:2508.10104): extractors around a frozen trunk.

It differs from the paper's adapter in three ways. The trunk runs once and receives nothing from the
adapter, because there are no injectors. Each extractor reads a layer of its own depth. And each
output adds its own layer, where the paper's adapter adds the last one to all four.
"""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from vitadapter_zoo.errors import ConfigError
from vitadapter_zoo.models.adapter import Geometry
from vitadapter_zoo.models.initial import draw
from vitadapter_zoo.models.spatial_prior import STEM_WIDTH
from vitadapter_zoo.models.trunk import AroundTimm, check_image, value_width
from vitadapter_zoo.models.vit import LAYER_NORM_EPS, tokens_to_map

DEFORM_HEADS = 16
DEFORM_RATIO = 0.5
DROP_PATH = 0.3
# The authors read these layers of their 24 blocks; every other depth is divided evenly.
LAYERS_OF_24 = (4, 11, 17, 23)


def interaction_indexes(depth: int) -> tuple[int, ...]:
    """Return the four blocks whose outputs the extractors read, counted from 0."""
    if depth == 24:
        return LAYERS_OF_24
    return tuple(index * depth // 4 - 1 for index in (1, 2, 3, 4))


class DINOv3Adapter(AroundTimm):
    """DINOv3's adapter around a timm vision transformer.

    The trunk is ``backbone``, under timm's names; the adapter's parameters have the names of the
    authors' ``DINOv3_Adapter``. Frozen on CUDA, a float32 trunk runs under bfloat16 autocast, as
    the authors' does.

    Args:
        trunk: a timm model; it is changed in place and becomes part of this module.
        indexes: the four blocks to read, ascending; by default the authors' choice for this depth.
        deform_heads: heads of the deformable attention.
        deform_ratio: width of the deformable attention's values relative to the tokens'.
        drop_path: stochastic-depth rate of the extractors, in training only.
        stem_width: width of the spatial prior's stem.
        frozen: the trunk has no gradients and stays in evaluation mode, as the authors' does.

    Raises:
        ConfigError: a model that does not fit, no such blocks, or widths that do not divide.
    """

    def __init__(
        self,
        trunk: nn.Module,
        *,
        indexes: Sequence[int] | None = None,
        deform_heads: int = DEFORM_HEADS,
        deform_ratio: float = DEFORM_RATIO,
        drop_path: float = DROP_PATH,
        stem_width: int = STEM_WIDTH,
        frozen: bool = True,
    ) -> None:
        super().__init__(trunk, frozen=frozen)
        depth, dim = len(self.backbone.blocks), self.backbone.embed_dim
        value_width(dim, deform_heads, deform_ratio)
        wanted = interaction_indexes(depth) if indexes is None else tuple(indexes)
        if len(wanted) != 4 or list(wanted) != sorted(set(wanted)) or wanted[0] < 0:
            raise ConfigError(f"indexes={list(wanted)}: give four ascending indices of blocks")
        if wanted[-1] >= depth:
            raise ConfigError(f"indexes={list(wanted)}: the trunk has blocks 0 to {depth - 1}")
        self.indexes = wanted
        self.add_adapter(
            dim, deform_heads, deform_ratio, LAYER_NORM_EPS, drop_path, stem_width, injects=False
        )
        self.draw_adapter(draw)

    def layers(self, image: Tensor) -> list[Tensor]:
        """Compute the trunk's four layers, each through the trunk's final norm.

        Args:
            image: ``[N, 3, H, W]``, normalised as the trunk's pretraining did; sides multiples
                of 16.

        Returns:
            Four tensors of patch tokens ``[N, H * W / 256, dim]``, without the prefix tokens.
        """
        with ExitStack() as stack:
            if self.frozen:
                stack.enter_context(torch.no_grad())
                if image.is_cuda and image.dtype == torch.float32:
                    stack.enter_context(torch.autocast("cuda", torch.bfloat16))
            tokens = self.backbone.forward_intermediates(
                image,
                indices=list(self.indexes),
                norm=True,
                stop_early=True,
                output_fmt="NLC",
                intermediates_only=True,
            )
        return [layer.to(image.dtype) for layer in tokens]

    def forward(self, image: Tensor) -> list[Tensor]:
        """Compute maps ``[N, dim, H / s, W / s]``, s = 4, 8, 16, 32, from images ``[N, 3, H, W]``.

        Raises:
            ImageError: ``H`` or ``W`` is not a multiple of 32.
        """
        check_image(image)
        geometry = Geometry.of(image)
        stem, c = self.prior_tokens(image)
        layers = self.layers(image)
        for interaction, layer in zip(self.interactions, layers, strict=True):
            c = interaction.extract(c, layer, geometry)  # type: ignore[operator]
        maps = [tokens_to_map(layer, *geometry.trunk) for layer in layers]
        return self.pyramid(stem, c, maps, geometry)
