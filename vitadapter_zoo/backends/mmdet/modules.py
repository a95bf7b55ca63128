"""This package's backbones and channel mapper with the argument names of the original project.

The original configuration files set every part of the network by arguments. The arguments in which
the published networks differ have an effect. The others are accepted with the published value and
refused with any other, so that no argument is ignored silently.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from vitadapter_zoo.errors import ConfigError
from vitadapter_zoo.models import adapter, necks, spatial_prior, uniperceiver, vit, vit_adapter
from vitadapter_zoo.weights.pretraining import read_pretraining

# Arguments that have the same value in all published networks, with that value.
PUBLISHED: dict[str, object] = {
    "patch_size": vit.PATCH,
    "in_chans": 3,
    "mlp_ratio": 4,
    "qkv_bias": True,
    "drop_rate": 0,
    "attn_drop_rate": 0,
    "conv_inplane": spatial_prior.STEM_WIDTH,
    "n_points": adapter.POINTS,
    "with_cffn": True,
    "cffn_ratio": adapter.CONV_FFN_RATIO,
    "add_vit_feature": True,
    "out_channels": necks.WIDTH,
    "kernel_size": 1,
    "conv_cfg": None,
    "norm_cfg": None,
    "act_cfg": {"type": "ReLU"},
    "num_outs": 5,
}


class ViTBaseline(vit.ViTBaseline):
    """The plain ViT backbone; arguments as in the original configuration files.

    Args:
        img_size, pretrain_size: side of the pretraining's images in pixels; both are equal.
        embed_dim, depth, num_heads: width, blocks and heads of the trunk.
        drop_path_rate: largest stochastic-depth rate, in training.
        layer_scale: False builds the blocks without ``gamma1`` and ``gamma2``.
        window_attn: per block, whether attention is windowed; one flag for all.
        window_size: per block, or one for all; 14 where attention is windowed.
        out_indices: the last blocks of the four quarters, whose outputs become the maps.
        with_cp: recompute the blocks in the backward pass, to save memory in training.
        pretrained: file or URL of the trunk's pretraining. ``init_weights()`` reads it when
            training starts.
        patch_size, in_chans, mlp_ratio, qkv_bias, drop_rate, attn_drop_rate: 16, 3, 4, True, 0, 0.

    Raises:
        ConfigError: an argument asks for a network that this package does not have.
    """

    def __init__(
        self,
        *,
        img_size: int = 224,
        pretrain_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale: bool = True,
        window_attn: bool | Sequence[bool] = False,
        window_size: int | Sequence[int | None] = 14,
        out_indices: Sequence[int] | None = None,
        with_cp: bool = False,
        pretrained: str | None = None,
    ) -> None:
        _only_as_published(
            patch_size=patch_size, in_chans=in_chans, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias,
            drop_rate=drop_rate, attn_drop_rate=attn_drop_rate,
        )  # fmt: skip
        _only("img_size", img_size, pretrain_size)
        ends = [last for _, last in _quarters(depth)]
        _only("out_indices", list(out_indices or ends), ends)
        windows = _windows(depth, window_attn, window_size)
        super().__init__(embed_dim, num_heads, windows, pretrain_size // vit.PATCH, drop_path_rate)
        self.pretrained = pretrained
        _finish(self, self.blocks, layer_scale=layer_scale, with_cp=with_cp)

    def forward(self, image: Tensor) -> list[Tensor]:
        """``[N, 3, H, W]`` to four maps at strides 4 to 32, contiguous."""
        return _contiguous(super().forward(image))

    def init_weights(self) -> None:
        """Read ``pretrained``; mmdet calls this when training starts.

        Raises:
            CheckpointError: it cannot be read, or is not the trunk's.
        """
        read_pretraining(self, self.pretrained)


class ViTAdapter(vit_adapter.ViTAdapter):
    """The ViT-Adapter backbone; arguments as in the original configuration files.

    Args:
        deform_num_heads, deform_ratio: heads of the deformable attention, and the width of its
            values relative to ``embed_dim``.
        init_values: initial value of the injectors' ``gamma``.
        interaction_indexes: first and last block of each interaction: the quarters of the trunk.
        use_extra_extractor: whether two more extractors follow the last interaction.
        conv_inplane: width of the spatial prior's stem.
        n_points, with_cffn, cffn_ratio, add_vit_feature: 4, True, 0.25, True.
        others: as for ``ViTBaseline``.

    Raises:
        ConfigError: an argument asks for a network that this package does not have.
    """

    def __init__(
        self,
        *,
        pretrain_size: int = 224,
        num_heads: int = 12,
        conv_inplane: int = 64,
        n_points: int = 4,
        deform_num_heads: int = 6,
        init_values: float = 0.0,
        interaction_indexes: Sequence[Sequence[int]] | None = None,
        with_cffn: bool = True,
        cffn_ratio: float = 0.25,
        deform_ratio: float = 1.0,
        add_vit_feature: bool = True,
        use_extra_extractor: bool = True,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale: bool = True,
        window_attn: bool | Sequence[bool] = False,
        window_size: int | Sequence[int | None] = 14,
        with_cp: bool = False,
        pretrained: str | None = None,
    ) -> None:
        _only_as_published(
            patch_size=patch_size, in_chans=in_chans, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias,
            drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, n_points=n_points,
            with_cffn=with_cffn, cffn_ratio=cffn_ratio, add_vit_feature=add_vit_feature,
        )  # fmt: skip
        _only("img_size", img_size, pretrain_size)
        _check_interactions(interaction_indexes, depth)
        super().__init__(
            embed_dim,
            num_heads,
            _windows(depth, window_attn, window_size),
            pretrain_size // vit.PATCH,
            drop_path_rate,
            deform_heads=deform_num_heads,
            deform_ratio=deform_ratio,
            stem_width=conv_inplane,
        )
        self.pretrained = pretrained
        _finish(self, self.blocks, layer_scale=layer_scale, with_cp=with_cp)
        _finish_adapter(self, init_values, use_extra_extractor)

    def forward(self, image: Tensor) -> list[Tensor]:
        """``[N, 3, H, W]`` to four maps at strides 4 to 32, contiguous."""
        return _contiguous(super().forward(image))

    def init_weights(self) -> None:
        """Read ``pretrained``; see ``ViTBaseline.init_weights``."""
        read_pretraining(self, self.pretrained)


class UniPerceiverAdapter(uniperceiver.UniPerceiverAdapter):
    """The adapter on a Uni-Perceiver trunk; arguments as in the original configuration files.

    Args:
        others: ``ViTAdapter``'s, as far as this trunk has them.

    Raises:
        ConfigError: an argument asks for a network that this package does not have.
    """

    def __init__(
        self,
        *,
        pretrain_size: int = 224,
        num_heads: int = 12,
        conv_inplane: int = 64,
        n_points: int = 4,
        deform_num_heads: int = 6,
        init_values: float = 0.0,
        with_cffn: bool = True,
        cffn_ratio: float = 0.25,
        deform_ratio: float = 1.0,
        add_vit_feature: bool = True,
        interaction_indexes: Sequence[Sequence[int]] | None = None,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        window_attn: bool | Sequence[bool] = False,
        window_size: int | Sequence[int | None] = 14,
        with_cp: bool = False,
        pretrained: str | None = None,
    ) -> None:
        _only_as_published(
            patch_size=patch_size, in_chans=in_chans, mlp_ratio=mlp_ratio,
            conv_inplane=conv_inplane, n_points=n_points, with_cffn=with_cffn,
            cffn_ratio=cffn_ratio, add_vit_feature=add_vit_feature,
        )  # fmt: skip
        _only("img_size", img_size, pretrain_size)
        _check_interactions(interaction_indexes, depth)
        super().__init__(
            embed_dim,
            num_heads,
            _windows(depth, window_attn, window_size),
            pretrain_size // vit.PATCH,
            drop_path_rate,
            deform_heads=deform_num_heads,
            deform_ratio=deform_ratio,
        )
        self.pretrained = pretrained
        _finish(self, self.layers, layer_scale=True, with_cp=with_cp)
        _finish_adapter(self, init_values, use_extra_extractor=True)

    def forward(self, image: Tensor) -> list[Tensor]:
        """``[N, 3, H, W]`` to four maps at strides 4 to 32, contiguous."""
        return _contiguous(super().forward(image))

    def init_weights(self) -> None:
        """Read ``pretrained``; see ``ViTBaseline.init_weights``."""
        read_pretraining(self, self.pretrained)


class ChannelMapperWithPooling(necks.ChannelMapper):
    """The neck without an FPN; arguments as in the original configuration files.

    Args:
        in_channels: the width of the four maps, four times.
        out_channels, kernel_size, num_outs: 256, 1, 5.
        conv_cfg, norm_cfg, act_cfg: None, None and ReLU.

    Raises:
        ConfigError: an argument asks for a neck that this package does not have.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        kernel_size: int = 1,
        conv_cfg: dict[str, Any] | None = None,
        norm_cfg: dict[str, Any] | None = None,
        act_cfg: dict[str, Any] | None = {"type": "ReLU"},  # noqa: B006  never written to
        num_outs: int | None = None,
    ) -> None:
        _only_as_published(
            out_channels=out_channels, kernel_size=kernel_size, conv_cfg=conv_cfg,
            norm_cfg=norm_cfg, act_cfg=act_cfg, num_outs=num_outs,
        )  # fmt: skip
        _only("in_channels", list(in_channels), [in_channels[0]] * 4)
        super().__init__(in_channels[0])

    def init_weights(self) -> None:
        """Xavier-uniform convolutions without bias, as in the original, when training starts."""
        for conv in self.convs.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.xavier_uniform_(conv.weight)
                if conv.bias is not None:
                    nn.init.zeros_(conv.bias)


def _only_as_published(**given: object) -> None:
    for name, value in given.items():
        _only(name, value, PUBLISHED[name])


def _only(name: str, given: object, published: object) -> None:
    if given != published:
        raise ConfigError(
            f"{name}={given!r} is not supported: vitadapter-zoo has only the published networks, "
            f"which have {name}={published!r}"
        )


def _quarters(depth: int) -> list[list[int]]:
    """First and last block of each of the four equal parts of the trunk."""
    if depth % 4:
        raise ConfigError(f"depth={depth}: the blocks are used in four equal parts")
    quarter = depth // 4
    return [[part * quarter, (part + 1) * quarter - 1] for part in range(4)]


def _check_interactions(indexes: Sequence[Sequence[int]] | None, depth: int) -> None:
    quarters = _quarters(depth)
    given = quarters if indexes is None else [list(span) for span in indexes]
    _only("interaction_indexes", given, quarters)


def _windows(
    depth: int, windowed: bool | Sequence[bool], size: int | Sequence[int | None]
) -> tuple[bool, ...]:
    """One flag per block, checked against the one window size that there is."""
    flags = [windowed] * depth if isinstance(windowed, bool) else list(windowed)
    sizes = [size] * depth if isinstance(size, int) else list(size)
    if len(flags) != depth or len(sizes) != depth:
        raise ConfigError(
            f"depth={depth}, but window_attn has {len(flags)} and window_size {len(sizes)} entries"
        )
    used = {side for flag, side in zip(flags, sizes, strict=True) if flag} - {vit.WINDOW}
    if used:
        raise ConfigError(f"window_size={used.pop()}: windows are {vit.WINDOW} x {vit.WINDOW}")
    return tuple(flags)


def _finish(network: nn.Module, blocks: nn.ModuleList, *, layer_scale: bool, with_cp: bool) -> None:
    """Apply the arguments of the original that change the trunk."""
    if not layer_scale:
        for block in blocks:
            for name in ("gamma1", "gamma2"):
                ones = torch.ones_like(block.get_parameter(name).detach())
                delattr(block, name)
                block.register_buffer(name, ones, persistent=False)
    if with_cp:
        for block in blocks:
            block.forward = functools.partial(_recomputed, block.forward)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # The original uses synchronised BatchNorm, which needs a process group.
        nn.SyncBatchNorm.convert_sync_batchnorm(network)


def _contiguous(maps: list[Tensor]) -> list[Tensor]:
    # mmcv's RoIAlign ignores strides and reads the memory as N, C, H, W. These maps come from
    # tokens and may have the channels last, and so would the neck's.
    return [x.contiguous() for x in maps]


def _recomputed(forward: Any, x: Tensor, height: int, width: int) -> Any:
    if not torch.is_grad_enabled():
        return forward(x, height, width)
    return recomputed(forward, x, height, width, use_reentrant=False)


def _finish_adapter(
    network: adapter.WithAdapter, init_values: float, use_extra_extractor: bool
) -> None:
    for interaction in network.interactions:
        nn.init.constant_(interaction.injector.gamma, init_values)  # type: ignore[union-attr,arg-type]
    if not use_extra_extractor:
        network.interactions[-1].extra_extractors = nn.ModuleList()
