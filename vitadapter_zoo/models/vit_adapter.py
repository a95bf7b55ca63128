"""The ViT-Adapter backbone (arXiv:2205.08534) around this package's trunk or a timm model."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitadapter_zoo.errors import ConfigError
from vitadapter_zoo.models.adapter import Geometry, WithAdapter
from vitadapter_zoo.models.initial import draw
from vitadapter_zoo.models.spatial_prior import STEM_WIDTH
from vitadapter_zoo.models.timm_windows import can_be_windowed, run_windowed
from vitadapter_zoo.models.trunk import (
    AroundTimm,
    check_image,
    deform_setting,
    embed,
    run_block,
    value_width,
)
from vitadapter_zoo.models.vit import LAYER_NORM_EPS, VisionTransformer, tokens_to_map


class ViTAdapter(VisionTransformer, WithAdapter):
    """The ViT-Adapter backbone: a plain ViT trunk with the adapter.

    Args:
        dim, heads, windows, pretrain_grid, drop_path: of the trunk, see ``VisionTransformer``.
        deform_heads: heads of the deformable attention.
        deform_ratio: width of the deformable attention's values relative to ``dim``.
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
        """Compute maps ``[N, dim, H / s, W / s]``, s = 4, 8, 16, 32, from images ``[N, 3, H, W]``.

        ``H`` and ``W`` are multiples of 32.
        """
        return self.adapted(image, self.embed(image), self.blocks)

    @classmethod
    def from_timm(
        cls,
        vit: nn.Module,
        *,
        windows: bool | Sequence[bool] = False,
        deform_heads: int | None = None,
        deform_ratio: float | None = None,
        drop_path: float = 0.0,
        stem_width: int = STEM_WIDTH,
        frozen: bool = False,
    ) -> "TimmViTAdapter":
        """Put the adapter around a timm vision transformer; see ``TimmViTAdapter``.

        Raises:
            ConfigError: the model does not fit, or a setting does not fit the model.
        """
        return TimmViTAdapter(
            vit,
            windows=windows,
            deform_heads=deform_heads,
            deform_ratio=deform_ratio,
            drop_path=drop_path,
            stem_width=stem_width,
            frozen=frozen,
        )


class TimmViTAdapter(AroundTimm):
    """The paper's adapter around a timm ``VisionTransformer`` or ``Eva``.

    The trunk is ``backbone``, under timm's names. Prefix tokens (class and registers) pass through
    the blocks, and injectors and extractors do not see them. As in the paper, the trunk's final
    norm takes no part in the maps.

    Args:
        trunk: a timm model; it is changed in place and becomes part of this module.
        windows: one flag per block, True for 14x14 windowed attention; or True for the published
            pattern, in which only the last block of each quarter is global; or False for global
            attention throughout, as the models were pretrained.
        deform_heads: heads of the deformable attention; by default as in the published sizes.
        deform_ratio: width of the deformable attention's values relative to the tokens'.
        drop_path: stochastic-depth rate of the extractors, in training only; the trunk has the
            rate that it was created with.
        stem_width: width of the spatial prior's stem.
        frozen: the trunk has no gradients and stays in evaluation mode. Injectors still change
            its tokens.

    Raises:
        ConfigError: the model does not fit, or a setting does not fit the model.
    """

    def __init__(
        self,
        trunk: nn.Module,
        *,
        windows: bool | Sequence[bool] = False,
        deform_heads: int | None = None,
        deform_ratio: float | None = None,
        drop_path: float = 0.0,
        stem_width: int = STEM_WIDTH,
        frozen: bool = False,
    ) -> None:
        super().__init__(trunk, frozen=frozen)
        heads, ratio = deform_setting(self.backbone)
        heads = heads if deform_heads is None else deform_heads
        ratio = ratio if deform_ratio is None else deform_ratio
        value_width(self.backbone.embed_dim, heads, ratio)
        self.windows = _windows(self.backbone.blocks, windows)
        self.add_adapter(
            self.backbone.embed_dim, heads, ratio, LAYER_NORM_EPS, drop_path, stem_width
        )
        self.draw_adapter(draw)
        # Only ``forward_features`` applies it. Distributed training expects a gradient of every
        # parameter that asks for one.
        self.backbone.norm.requires_grad_(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Compute maps ``[N, dim, H / s, W / s]``, s = 4, 8, 16, 32, from images ``[N, 3, H, W]``.

        Args:
            image: normalised as the trunk's pretraining did.

        Raises:
            ImageError: ``H`` or ``W`` is not a multiple of 32.
        """
        check_image(image)
        geometry = Geometry.of(image)
        stem, c = self.prior_tokens(image)
        tokens, c = self._interact(image, c, geometry)
        trunk = tokens_to_map(tokens[:, self.backbone.num_prefix_tokens :], *geometry.trunk)
        return self.pyramid(stem, c, [trunk] * 4, geometry)

    def forward_features(self, image: Tensor) -> Tensor:
        """Compute the trunk's tokens after the last block and the trunk's final norm.

        As long as the injectors' ``gamma`` is zero, as it is at first, and no block is windowed,
        these are the tokens of timm's ``forward_features``: prefix tokens, then patches,
        ``[N, prefix + H * W / 256, dim]``.

        Raises:
            ImageError: ``H`` or ``W`` is not a multiple of 32.
        """
        check_image(image)
        tokens, _ = self._interact(image, self.prior_tokens(image)[1], Geometry.of(image))
        return self.backbone.norm(tokens)

    def _interact(self, image: Tensor, c: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """Run trunk and interactions; return all trunk tokens and the prior tokens."""
        prefix = self.backbone.num_prefix_tokens
        tokens, ropes = embed(self.backbone, image)
        blocks = self.backbone.blocks
        for index, interaction in enumerate(self.interactions):
            injected = interaction.injector(tokens[:, prefix:], c, geometry)  # type: ignore[operator]
            tokens = torch.cat([tokens[:, :prefix], injected], dim=1) if prefix else injected
            for number in range(index * len(blocks) // 4, (index + 1) * len(blocks) // 4):
                if self.windows[number]:
                    tokens = run_windowed(
                        blocks[number], tokens, ropes[number], prefix, *geometry.trunk
                    )
                else:
                    tokens = run_block(blocks[number], tokens, ropes[number])
            c = interaction.extract(c, tokens[:, prefix:], geometry)  # type: ignore[operator]
        return tokens, c


def _windows(blocks: nn.ModuleList, windows: bool | Sequence[bool]) -> tuple[bool, ...]:
    """One flag per block.

    Raises:
        ConfigError: another number of flags than blocks, or blocks that cannot be windowed.
    """
    children: list[Any] = list(blocks)
    depth = len(children)
    if isinstance(windows, bool):
        ends = {(index + 1) * depth // 4 - 1 for index in range(4)}
        flags = tuple(windows and index not in ends for index in range(depth))
    else:
        flags = tuple(bool(flag) for flag in windows)
    if len(flags) != depth:
        raise ConfigError(f"windows has {len(flags)} flags for {depth} blocks: give one for each")
    for block, windowed in zip(children, flags, strict=True):
        if windowed and not can_be_windowed(block):
            raise ConfigError(
                f"windows: blocks of class {type(block).__name__} (with "
                f"{type(getattr(block, 'attn', None)).__name__}) cannot be windowed; use "
                f"windows=False. timm's {Block.__name__} and {EvaBlock.__name__} can be"
            )
    return flags
