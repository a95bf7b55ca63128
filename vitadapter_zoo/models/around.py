"""Build an adapter around a timm model, given the model's name."""

import difflib
from collections.abc import Sequence
from typing import Any

import timm
import torch

from vitadapter_zoo.catalog import IMAGENET_MEAN, IMAGENET_STD, Triple, list_models
from vitadapter_zoo.errors import ConfigError, DownloadError, UnknownModelError
from vitadapter_zoo.models.dinov3 import DROP_PATH, DINOv3Adapter
from vitadapter_zoo.models.spatial_prior import STEM_WIDTH
from vitadapter_zoo.models.trunk import FITTING, AroundTimm, Trunk, check_kind
from vitadapter_zoo.models.vit_adapter import ViTAdapter
from vitadapter_zoo.text import quoted, shown
from vitadapter_zoo.timm_detector import ADAPTERS, PAPER, TimmDetector


def timm_name(name: str) -> str:
    """Return timm's name of the model, without the Hub's ``timm/``."""
    return name.removeprefix("timm/")


def check_adapter(adapter: str) -> None:
    """Refuse an arrangement that does not exist.

    Raises:
        ConfigError: with those that exist.
    """
    if adapter not in ADAPTERS:
        raise ConfigError(f"adapter={quoted(adapter)}: it must be one of 'paper' and 'dinov3'")


def check_name(name: str) -> None:
    """Refuse a name that timm does not have, without building anything.

    Raises:
        UnknownModelError: the message offers the nearest.
    """
    bare = timm_name(name)
    if not timm.is_model(bare):
        names = [*list_models(), *timm.list_models()]
        near = difflib.get_close_matches(bare.partition(".")[0], names, 3, 0.4)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise UnknownModelError(
            f"unknown backbone {quoted(name)}: {hint}timm.list_models('vit_*') shows timm's, "
            "`vitadapter-zoo list` this package's"
        )


def create_trunk(name: str, *, pretrained: bool, drop_path: float = 0.0, **settings: Any) -> Trunk:
    """Create a timm vision transformer without its head, on the default device.

    Args:
        name: of timm, with or without ``timm/`` and a tag.
        pretrained: load timm's weights, from the Hub or its cache.
        drop_path: stochastic-depth rate of the last block, in training only.
        settings: further arguments of timm's class.

    Raises:
        UnknownModelError: timm has no such name; the message suggests similar names.
        ConfigError: a kind of network that an adapter does not fit, or no such setting.
        DownloadError: the weights cannot be fetched.
    """
    bare = timm_name(name)
    check_name(name)
    try:
        trunk = timm.create_model(
            bare,
            pretrained=pretrained,
            num_classes=0,
            dynamic_img_size=True,
            drop_path_rate=drop_path,
            **settings,
        )
    except TypeError as error:
        if settings and "dynamic_img_size" not in str(error):
            raise ConfigError(f"{shown(bare)} has no such setting ({shown(error)})") from error
        raise ConfigError(f"{shown(bare)} does not fit: {FITTING}") from error
    except (AssertionError, ValueError) as error:  # timm's for widths that do not divide
        raise ConfigError(
            f"timm cannot build {shown(bare)} with {shown(settings)} ({shown(error)}): the width "
            "has to be a multiple of the heads, four times over"
        ) from error
    except RuntimeError as error:  # timm's for a tag or weights that it does not have
        raise _no_weights(name, error) from error
    except OSError as error:  # the Hub's and requests' errors are of this kind
        raise DownloadError(
            f"cannot fetch timm's weights of {shown(bare)} ({shown(error, 200)}); try again, or "
            "give a file with checkpoint="
        ) from error
    check_kind(trunk, shown(bare))
    return trunk


def surround(
    trunk: Trunk,
    adapter: str,
    *,
    windows: bool | Sequence[bool] = False,
    frozen: bool | None = None,
    drop_path: float | None = None,
    stem_width: int = STEM_WIDTH,
) -> AroundTimm:
    """Put an adapter around a timm model.

    Args:
        trunk: it is changed in place.
        adapter: ``"paper"`` (injectors and extractors) or ``"dinov3"`` (extractors only).
        windows: windowed blocks of the paper's adapter, see ``TimmViTAdapter``.
        frozen: whether the trunk is; by default DINOv3's is and the paper's is not.
        drop_path: stochastic-depth rate of the extractors; 0 and 0.3 by default.
        stem_width: width of the spatial prior's stem.

    Raises:
        ConfigError: no such adapter, or a setting that does not fit.
    """
    check_adapter(adapter)
    if adapter == PAPER:
        return ViTAdapter.from_timm(
            trunk,
            windows=windows,
            frozen=bool(frozen),
            drop_path=drop_path or 0.0,
            stem_width=stem_width,
        )
    if windows is not False:
        raise ConfigError("windows: DINOv3's adapter runs its trunk as it is; leave windows out")
    return DINOv3Adapter(
        trunk,
        frozen=frozen is None or frozen,
        drop_path=DROP_PATH if drop_path is None else drop_path,
        stem_width=stem_width,
    )


def build_around(network: TimmDetector) -> AroundTimm:
    """Build the backbone of a detector around a timm model, with fresh weights.

    Raises:
        UnknownModelError: timm has no such trunk.
        ConfigError: a trunk that does not fit, or settings that do not fit the trunk.
    """
    sizes = {"embed_dim": network.dim, "depth": network.depth, "num_heads": network.heads}
    trunk = create_trunk(
        network.trunk,
        pretrained=False,
        drop_path=0.0 if network.frozen else network.drop_path,
        **{name: size for name, size in sizes.items() if size is not None},
    )
    backbone = surround(
        trunk,
        network.adapter,
        windows=network.windows,
        frozen=network.frozen,
        drop_path=network.drop_path,
        stem_width=network.stem_width,
    )
    set_periods(backbone, network)
    return backbone


def set_periods(backbone: AroundTimm, network: TimmDetector) -> None:
    """Set the rotary embedding's periods of a detector that has others than timm computes.

    They are float32 in a network of any dtype. timm computes them again when it converts the
    dtype, so that they are set again afterwards.

    Raises:
        ConfigError: the trunk has no such periods, or another number of them.
    """
    if network.periods is None:
        return
    periods = getattr(getattr(backbone.backbone, "rope", None), "periods", None)
    if periods is None or len(periods) != len(network.periods):
        raise ConfigError(
            f"{shown(network.trunk)} has {0 if periods is None else len(periods)} periods of a "
            f"rotary embedding, and the settings have {len(network.periods)}"
        )
    periods.copy_(torch.tensor(network.periods))


def pretraining(name: str) -> Any | None:
    """Return timm's settings of the weights of that name; None where timm has none.

    Raises:
        UnknownModelError: timm has no weights of that tag.
    """
    try:
        return timm.get_pretrained_cfg(timm_name(name))
    except RuntimeError as error:
        raise _no_weights(name, error) from error


def pretraining_pixels(name: str) -> tuple[Triple, Triple]:
    """Mean and deviation of the pretraining's images, RGB, 0..255; ImageNet's without pretraining.

    Raises:
        UnknownModelError: timm has no weights of that tag.
    """
    known = pretraining(name)
    if known is None:
        return IMAGENET_MEAN, IMAGENET_STD
    mean, std = (tuple(255 * value for value in values) for values in (known.mean, known.std))
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def _no_weights(name: str, error: RuntimeError) -> UnknownModelError:
    """The error for a tag or weights that timm does not have."""
    return UnknownModelError(
        f"timm has no weights for {quoted(name)} ({shown(error)}); "
        f"timm.list_pretrained({timm_name(name).partition('.')[0] + '*'!r}) shows those that it has"
    )
