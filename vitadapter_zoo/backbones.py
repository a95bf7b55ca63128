"""Feature extractors for other people's models: the rows' backbones, and timm's with an adapter."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import timm
from timm.models import register_model
from torch import nn

from vitadapter_zoo import settings
from vitadapter_zoo.catalog import Row, get_row, list_models
from vitadapter_zoo.errors import ConfigError, DownloadError
from vitadapter_zoo.finder import place_of
from vitadapter_zoo.loader import load
from vitadapter_zoo.models.around import PAPER, check_adapter, create_trunk, surround, timm_name
from vitadapter_zoo.models.build import build_backbone
from vitadapter_zoo.text import quoted, shown
from vitadapter_zoo.weights.trunks import read_backbone

ALL = (0, 1, 2, 3)


def backbone(
    name: str | os.PathLike[str],
    *,
    adapter: str = PAPER,
    checkpoint: str | os.PathLike[str] | None = None,
    pretrained: bool | None = None,
    out_indices: Sequence[int] = ALL,
    windows: bool | Sequence[bool] = False,
    frozen: bool | None = None,
    drop_path: float | None = None,
    cache_dir: settings.Home = None,
    offline: bool | None = None,
    progress: bool = True,
) -> nn.Module:
    """Return a backbone without neck and heads, in evaluation mode.

    ``forward`` maps images ``[N, 3, H, W]`` (sides multiples of 32, normalised as for the
    pretraining) to a list of maps ``[N, dim, H / s, W / s]``, s = 4, 8, 16, 32. ``feature_info``
    describes them as timm does: ``channels()`` and ``reduction()``.

    Args:
        name: a load name of the catalog, or a folder or repository as for ``load``: the backbone
            of that detector. Or a name of timm, with or without ``timm/``: that vision transformer
            with an adapter around it.
        adapter: around a timm model: ``"paper"`` (ViT-Adapter's injectors and extractors) or
            ``"dinov3"`` (DINOv3's own, without injectors).
        checkpoint: a file of the weights. For a timm model: the trunk's, or trunk and adapter
            together, under timm's names or the authors'.
        pretrained: use the published weights of the row, or timm's for the trunk (the adapter's
            are random); True by default without a ``checkpoint``.
        out_indices: the maps to return, 0 (stride 4) to 3 (stride 32), ascending.
        windows: use windowed blocks in a timm trunk, see ``ViTAdapter.from_timm``.
        frozen: a timm trunk without gradients, in evaluation mode; True by default for
            ``"dinov3"``, False for ``"paper"``.
        drop_path: stochastic-depth rate of a timm model's adapter, and of its trunk unless that is
            frozen; 0.3 by default for ``"dinov3"``, 0 for ``"paper"``.
        cache_dir: as for ``load``.
        offline: as for ``load``.
        progress: as for ``load``.

    Raises:
        UnknownModelError: neither the catalog nor timm has the name; the message suggests others.
        ConfigError: the timm model is not a plain vision transformer, a setting does not fit,
            or ``pretrained=True`` with a ``checkpoint``.
        CheckpointError: the file is damaged or unsafe, or its weights do not fit the network.
        DownloadError: weights cannot be fetched.
    """
    check_adapter(adapter)
    if pretrained and checkpoint is not None:
        raise ConfigError("pretrained=True takes no checkpoint: leave one of them out")
    published = checkpoint is None if pretrained is None else pretrained
    common = {"cache_dir": cache_dir, "offline": offline, "progress": progress}
    if _is_detector(name):
        if adapter != PAPER or windows is not False or frozen is not None or drop_path is not None:
            raise ConfigError(
                f"{quoted(os.fspath(name), 200)} has a backbone of its own: adapter, windows, "
                "frozen and drop_path are for timm's models"
            )
        network = _of_detector(name, checkpoint, published, common)
    else:
        network = _of_timm(
            str(name),
            checkpoint,
            published,
            common,
            {"adapter": adapter, "windows": windows, "frozen": frozen, "drop_path": drop_path},
        )
    network.select(out_indices)  # type: ignore[operator]
    return network.eval()


def _is_detector(name: str | os.PathLike[str]) -> bool:
    text = os.fspath(name)
    if text in list_models():
        return True
    return not text.startswith("timm/") and place_of(name) is not None


def _of_detector(
    name: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] | None,
    pretrained: bool,
    common: dict[str, Any],
) -> nn.Module:
    if checkpoint is None and not pretrained and os.fspath(name) in list_models():
        network = build_backbone(get_row(os.fspath(name)))
    else:
        network = load(name, checkpoint=checkpoint, pretrained=True, **common).backbone
    return network


def _of_timm(
    name: str,
    checkpoint: str | os.PathLike[str] | None,
    pretrained: bool,
    common: dict[str, Any],
    options: dict[str, Any],
) -> nn.Module:
    trunk_drop_path = 0.0 if options["frozen"] else options["drop_path"] or 0.0
    if pretrained and settings.is_offline(common["offline"]):
        checkpoint, pretrained = _cached(name), False
    trunk = create_trunk(name, pretrained=pretrained, drop_path=trunk_drop_path)
    network = surround(trunk, **options)
    if checkpoint is not None:
        read_backbone(network, name, checkpoint, **common)
    return network


def _cached(name: str) -> str:
    """The file of timm's weights in huggingface_hub's cache.

    Raises:
        DownloadError: it is not there.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    found = timm.get_pretrained_cfg(timm_name(name))
    repository = found.hf_hub_id if found is not None else None
    if repository:
        path = try_to_load_from_cache(
            repository, "model.safetensors", cache_dir=constants.HF_HUB_CACHE
        )
        if isinstance(path, str):
            return path
    raise DownloadError(
        f"{repository or shown(name)} is not in {constants.HF_HUB_CACHE}, and this is offline "
        "mode; give a file with checkpoint=, or load it once with the network"
    )


def register_timm() -> list[str]:
    """Register the rows' backbones with timm. A second call has no effect.

    ``timm.create_model("adapter_s_deit_3x", features_only=True, pretrained=True)`` then gives the
    backbone of ``adapter-s-deit-3x``, in training mode as timm's models are.

    Returns:
        The names under which timm knows them.
    """
    registered = []
    for name in list_models():
        entry = _entry(get_row(name))
        if not timm.is_model(entry.__name__):
            register_model(entry)
        registered.append(entry.__name__)
    return registered


def _entry(row: Row) -> Callable[..., nn.Module]:
    def create(
        pretrained: bool = False,
        features_only: bool = False,
        out_indices: Sequence[int] = ALL,
        **more: Any,
    ) -> nn.Module:
        # timm passes these to every model; they concern its own downloads and classifiers.
        own = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "num_classes")
        others = [key for key, value in more.items() if key not in own and value is not None]
        if more.get("in_chans", 3) == 3:
            others = [key for key in others if key != "in_chans"]
        if not features_only or others:
            wrong = f" without {', '.join(others)}" if others else ""
            raise ConfigError(
                f"{create.__name__} has no classifier: create it with features_only=True{wrong}"
            )
        network = backbone(
            row.name,
            pretrained=pretrained,
            out_indices=out_indices,
            cache_dir=more.get("cache_dir"),
        )
        mean, std = (tuple(value / 255 for value in triple) for triple in (row.mean, row.std))
        # ``pretrained_cfg`` is where timm.data.resolve_model_data_config looks.
        network.pretrained_cfg = {"mean": mean, "std": std, "interpolation": "bilinear"}  # type: ignore[assignment]
        return network.train()

    create.__name__ = row.name.replace("-", "_")
    create.__doc__ = f"The backbone of {row.name}."
    create.__module__ = __name__
    return create
