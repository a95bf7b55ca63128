"""An adapter around a timm model that is known by its name."""

import difflib
from collections.abc import Sequence
from typing import Any

import timm

from vitadapter_zoo.catalog import list_models
from vitadapter_zoo.errors import ConfigError, DownloadError, UnknownModelError
from vitadapter_zoo.models.dinov3 import DROP_PATH, DINOv3Adapter
from vitadapter_zoo.models.spatial_prior import STEM_WIDTH
from vitadapter_zoo.models.trunk import FITTING, AroundTimm, Trunk, check_kind
from vitadapter_zoo.models.vit_adapter import ViTAdapter
from vitadapter_zoo.text import quoted, shown

PAPER, DINOV3 = "paper", "dinov3"
ADAPTERS = (PAPER, DINOV3)


def timm_name(name: str) -> str:
    """The name that timm knows, without the Hub's ``timm/``."""
    return name.removeprefix("timm/")


def check_adapter(adapter: str) -> None:
    """Refuse an arrangement that does not exist.

    Raises:
        ConfigError: with those that exist.
    """
    if adapter not in ADAPTERS:
        raise ConfigError(f"adapter={quoted(adapter)}: it must be one of 'paper' and 'dinov3'")


def create_trunk(name: str, *, pretrained: bool, drop_path: float = 0.0, **settings: Any) -> Trunk:
    """Create a timm vision transformer without its head, on the default device.

    Args:
        name: of timm, with or without ``timm/`` and a tag.
        pretrained: load timm's weights, from the Hub or its cache.
        drop_path: stochastic-depth rate of the last block, in training only.
        settings: further arguments of timm's class.

    Raises:
        UnknownModelError: timm has no such name; the message offers the nearest.
        ConfigError: a kind of network that an adapter does not fit, or no such setting.
        DownloadError: the weights cannot be fetched.
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
    except RuntimeError as error:  # timm's for a tag or weights that it does not have
        raise UnknownModelError(
            f"timm has no weights for {quoted(name)} ({shown(error)}); "
            f"timm.list_pretrained({bare.partition('.')[0] + '*'!r}) shows those that it has"
        ) from error
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


def normalisation(trunk: Trunk) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the trunk's pretraining images, RGB, 0..255."""
    settings = trunk.pretrained_cfg
    mean, std = settings["mean"], settings["std"]
    return tuple(255 * value for value in mean), tuple(255 * value for value in std)
