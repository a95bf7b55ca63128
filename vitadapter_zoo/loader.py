"""From a name to a ready detector: download, convert, cache, build, assign."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import nn

from vitadapter_zoo import settings
from vitadapter_zoo.errors import CheckpointError, ConfigError
from vitadapter_zoo.finder import Found as Found
from vitadapter_zoo.finder import find as find
from vitadapter_zoo.finder import place_of
from vitadapter_zoo.models import MaskRCNN, build
from vitadapter_zoo.models.around import set_periods
from vitadapter_zoo.models.build import build_empty
from vitadapter_zoo.models.trunk import AroundTimm
from vitadapter_zoo.text import quoted, shown
from vitadapter_zoo.weights import checkpoint as containers
from vitadapter_zoo.weights import convert, heads, resolve, timm_files
from vitadapter_zoo.weights.fit import check_finite
from vitadapter_zoo.weights.progress import bars
from vitadapter_zoo.weights.shards import MOST_CLASSES
from vitadapter_zoo.weights.source import HubFile, parse

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Options(TypedDict, total=False):
    """The arguments of ``load`` that both of its overloads take."""

    checkpoint: str | os.PathLike[str] | None
    classes: Sequence[str] | None
    pretrained: bool
    device: str | torch.device
    dtype: torch.dtype | None
    cache_dir: settings.Home
    offline: bool | None
    progress: bool
    allow_nonfinite: bool


logger = logging.getLogger(__name__)


@overload
def load(
    name: str | os.PathLike[str],
    *,
    backend: Literal["native"] = "native",
    **options: Unpack[_Options],
) -> MaskRCNN: ...


@overload
def load(
    name: str | os.PathLike[str], *, backend: Literal["mmdet"], **options: Unpack[_Options]
) -> nn.Module: ...


def load(
    name: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    pretrained: bool = True,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool | None = None,
    progress: bool = True,
    allow_nonfinite: bool = False,
    backend: Literal["native", "mmdet"] = "native",
) -> MaskRCNN | nn.Module:
    """Load a detector in evaluation mode.

    The first call downloads the row's published file, converts it to safetensors and stores the
    result in the cache; later calls map the converted file into memory.

    Args:
        name: load name, see ``vitadapter_zoo.list_models()``; or a folder that ``save_pretrained``
            wrote, or a repository of the Hub that ``push_to_hub`` wrote: ``user/repo`` or
            ``hf://user/repo[@revision]``.
        checkpoint: a local ``.pth``, ``.pth.tar`` or ``.safetensors`` file, an http(s) URL, or a
            file on the Hub: ``hf://user/repo[@revision][/file]`` or ``user/repo``; the row's own
            source by default. Local files are never altered. For a folder that refers to its
            trunk's weights: the file with those weights.
        classes: names of the detector's classes. A checkpoint of your own with the same number of
            classes gets these names. Otherwise the heads keep the weights of classes with the
            same name; the other classes get random weights, to be trained. By default the
            classes are the checkpoint's: COCO's, a folder's, or those that mmdet stored in it.
        pretrained: False initialises random weights, for training from scratch, and reads no file.
        device: the parameters' device.
        dtype: floating-point type of the weights; float32, as stored, by default.
        cache_dir: where converted weights are stored; ``$VITADAPTER_ZOO_HOME`` or the platform's
            cache directory by default.
        offline: True never uses the network; the error says what is missing. By default the
            environment variable ``VITADAPTER_ZOO_OFFLINE`` decides.
        progress: show progress bars on a terminal.
        allow_nonfinite: accept weights that are NaN or infinite.
        backend: ``"mmdet"`` gives a ``mmdet.models.MaskRCNN`` with the same weights, for
            ``mmdet.apis.inference_detector`` and mmdet's tools; see
            ``vitadapter_zoo.backends.mmdet``.

    Raises:
        UnknownModelError: no such name; the message suggests similar names.
        DownloadError: the file cannot be fetched, or is not the published one.
        CheckpointError: the file is damaged, unsafe, not a checkpoint of this model, or holds
            weights that are not finite.
        BackendError: mmdet is missing, broken, or cannot run this ``dtype``.
        ZooError: the cache cannot be written to.
        ConfigError: ``checkpoint`` together with ``pretrained=False`` or a folder, no such
            ``backend``, or ``classes`` that are not distinct names.
    """
    if backend not in ("native", "mmdet"):
        raise ConfigError(f"backend={quoted(backend)}: it must be one of 'native' and 'mmdet'")
    if backend == "mmdet":
        from vitadapter_zoo.backends.mmdet import from_native  # fails before a long download
    wanted = None if classes is None else _distinct(classes)
    _check_combination(name, checkpoint, pretrained)
    found = find(name, cache_dir=cache_dir, offline=offline, progress=progress)
    refers = found.row.network is not None and not found.row.network.stored
    if found.place is not None and checkpoint is not None and not refers:
        raise _has_weights(name)
    # Tensors made in inference mode cannot be trained.
    with torch.inference_mode(False):
        if pretrained:
            with torch.device("cpu"):
                loaded, origin = _weights(
                    found, checkpoint, cache_dir, offline, progress, allow_nonfinite
                )
                is_own = checkpoint is not None and found.place is None
                trunk, read_digest = timm_files.referenced_trunk(
                    found.row, origin, checkpoint,
                    cache_dir=cache_dir, offline=offline, progress=progress,
                )  # fmt: skip
                loaded = replace(loaded, tensors=loaded.tensors | trunk)
                model = _assembled(found, loaded, origin, is_own, wanted, allow_nonfinite)
                if dtype is None and found.place is not None:
                    dtype = getattr(torch, found.dtype)
                model.to(device=device, dtype=dtype)
                if found.row.network is not None and isinstance(model.backbone, AroundTimm):
                    set_periods(model.backbone, found.row.network)
                    model.backbone.read_digest = read_digest
            if dtype in (torch.float16, torch.bfloat16) and not allow_nonfinite:
                check_finite(model.state_dict(), f"{origin}, converted to {dtype},")
        else:
            with torch.device(device):
                model = build(found.row, wanted or found.categories)
            model.to(device=device, dtype=dtype)
    model.eval()
    return from_native(model) if backend == "mmdet" else model


def _check_combination(
    name: str | os.PathLike[str], checkpoint: str | os.PathLike[str] | None, pretrained: bool
) -> None:
    if place_of(name) is not None and not pretrained:
        raise _has_weights(name)
    if not pretrained and checkpoint is not None:
        raise ConfigError("pretrained=False takes no checkpoint: leave one of them out")


def _has_weights(name: str | os.PathLike[str]) -> ConfigError:
    return ConfigError(
        f"{quoted(os.fspath(name), 200)} has weights of its own: leave checkpoint and pretrained "
        "out"
    )


def _distinct(classes: Sequence[str]) -> tuple[str, ...]:
    """Check class names and return them as a tuple.

    Raises:
        ConfigError: no names, a single string, a value that is not a string, or a name twice.
    """
    if isinstance(classes, str) or not classes or len(classes) > MOST_CLASSES:
        raise ConfigError(f"classes must be a list of 1 to {MOST_CLASSES:,} names")
    names = tuple(classes)
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(f"classes[{index}] is {quoted(name)}; it must be a name")
    counts = Counter(names)
    twice = next((name for name in names if counts[name] > 1), None)
    if twice is not None:
        raise ConfigError(f"classes holds {quoted(twice)} twice; each class needs its own name")
    return names


def _weights(
    found: Found,
    checkpoint: str | os.PathLike[str] | None,
    cache_dir: settings.Home,
    offline: bool | None,
    progress: bool,
    allow_nonfinite: bool,
) -> tuple[containers.Checkpoint, str]:
    """Read the checkpoint of a name; return it with its name for error messages."""
    if found.place is not None:
        from vitadapter_zoo.publishing.pretrained import fetch_folder, weights_files

        folder = found.place
        if isinstance(folder, HubFile):
            home, without_network = settings.home(cache_dir), settings.is_offline(offline)
            with bars(progress) as lines:
                folder = fetch_folder(folder, home, lines(str(folder)), offline=without_network)
        return containers.read_all(weights_files(folder), shown(folder, 200)), shown(folder, 200)
    source = resolve.published(found.row) if checkpoint is None else parse(checkpoint)
    with bars(progress) as lines:
        paths = resolve.obtain(
            found.row, source, lines, cache_dir=cache_dir, offline=offline,
            allow_nonfinite=allow_nonfinite,
        )  # fmt: skip
    origin = shown(source if len(paths) > 1 else paths[0], 200)
    return containers.read_all(paths, origin), origin


def _assembled(
    found: Found,
    loaded: containers.Checkpoint,
    origin: str,
    is_own: bool,
    wanted: tuple[str, ...] | None,
    allow_nonfinite: bool,
) -> MaskRCNN:
    """Build the network with the weights, and with the requested classes."""
    has = found.categories if found.place is not None else convert.class_names(loaded, found.row)
    if is_own and wanted is not None and len(wanted) == (has if isinstance(has, int) else len(has)):
        has = wanted
    if isinstance(has, int):
        raise CheckpointError(
            f"{origin} has {has} classes and does not hold their names: give them, "
            f"load({found.name!r}, checkpoint=..., classes=[...])"
        )
    model = _fitted(found, loaded, origin, has, allow_nonfinite)
    if wanted is None or wanted == has:
        return model
    other = build_empty(found.row, wanted)
    other.load_state_dict(heads.for_classes(model.state_dict(), has, wanted), assign=True)
    kept = [name for name in wanted if name in has]
    fresh = [name for name in wanted if name not in has]
    logger.warning("%s: heads kept for %s; fresh heads for %s", origin, _few(kept), _few(fresh))
    return other


def _fitted(
    found: Found,
    loaded: containers.Checkpoint,
    origin: str,
    categories: tuple[str, ...],
    allow_nonfinite: bool,
) -> MaskRCNN:
    # The file's tensors become the parameters themselves.
    model = build_empty(found.row, categories)
    fitted = convert.fit(loaded, found.row, model, origin, allow_nonfinite=allow_nonfinite)
    model.load_state_dict(fitted.tensors, assign=True)
    return model


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(shown(name, 30) for name in names[:4]) + more if names else "none"
