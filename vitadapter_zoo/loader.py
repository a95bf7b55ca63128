"""From a name to a ready detector: download, convert, cache, build, assign."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor, nn

from vitadapter_zoo import settings
from vitadapter_zoo.catalog import Row, get_row, list_models
from vitadapter_zoo.errors import CheckpointError
from vitadapter_zoo.models import MaskRCNN, build
from vitadapter_zoo.weights import checkpoint as containers
from vitadapter_zoo.weights import convert, resolve
from vitadapter_zoo.weights.progress import bars
from vitadapter_zoo.weights.source import HubFile, parse

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Options(TypedDict, total=False):
    """The arguments of ``load`` that both of its overloads take."""

    checkpoint: str | os.PathLike[str] | None
    pretrained: bool
    device: str | torch.device
    dtype: torch.dtype | None
    cache_dir: settings.Home
    offline: bool | None
    progress: bool


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
    pretrained: bool = True,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool | None = None,
    progress: bool = True,
    backend: Literal["native", "mmdet"] = "native",
) -> MaskRCNN | nn.Module:
    """Load a detector in evaluation mode.

    The first call downloads the row's published file, converts it to safetensors and keeps that in
    the cache; later calls map the converted file into memory.

    Args:
        name: load name, see ``vitadapter_zoo.list_models()``; or a folder that ``save_pretrained``
            wrote, or a repository of the Hub that ``push_to_hub`` made: ``user/repo`` or
            ``hf://user/repo[@revision]``.
        checkpoint: a local ``.pth``, ``.pth.tar`` or ``.safetensors`` file, an http(s) URL, or a
            place on the Hub: ``hf://user/repo[@revision][/file]`` or ``user/repo``; the row's own
            source by default. Local files are never altered.
        pretrained: False gives fresh weights (training from scratch) and reads no file.
        device: where the detector lives.
        dtype: floating-point type of the weights; float32, as stored, by default.
        cache_dir: where converted weights are kept; ``$VITADAPTER_ZOO_HOME`` or the platform's
            cache directory by default.
        offline: True never uses the network, and says what is missing; by default that is what
            ``VITADAPTER_ZOO_OFFLINE`` says.
        progress: False shows no progress bar on a terminal either.
        backend: ``"mmdet"`` gives a ``mmdet.models.MaskRCNN`` with the same weights, for
            ``mmdet.apis.inference_detector`` and mmdet's tools; see
            ``vitadapter_zoo.backends.mmdet``.

    Raises:
        UnknownModelError: no such name; the message offers the nearest.
        DownloadError: the file cannot be fetched, or is not the published one.
        CheckpointError: the file is damaged, unsafe, or not a checkpoint of this model.
        BackendError: mmdet is asked for, and is missing, broken, or cannot run this ``dtype``.
        ZooError: the cache cannot be written to.
        ValueError: ``checkpoint`` together with ``pretrained=False``, or no such ``backend``.
    """
    if backend not in ("native", "mmdet"):
        raise ValueError(f"backend={backend!r}: there are 'native' and 'mmdet'")
    if backend == "mmdet":
        from vitadapter_zoo.backends.mmdet import from_native  # before a long download

        return from_native(
            load(
                name,
                checkpoint=checkpoint,
                pretrained=pretrained,
                device=device,
                dtype=dtype,
                cache_dir=cache_dir,
                offline=offline,
                progress=progress,
            )
        )
    folder = _folder(name)
    if folder is not None:
        if checkpoint is not None or not pretrained:
            raise ValueError(
                f"{name!r} has weights of its own: leave checkpoint and pretrained out"
            )
        model = _published(folder, cache_dir, offline, progress)
        return model.to(device=device, dtype=dtype).eval()
    row = get_row(os.fspath(name))
    if not pretrained:
        if checkpoint is not None:
            raise ValueError("pretrained=False takes no checkpoint: leave one of them out")
        with torch.device(device):
            model = build(row)
    else:
        # Built without memory; the file's tensors then become the parameters themselves.
        with torch.device("meta"):
            model = build(row)
        tensors = _weights(row, model, checkpoint, cache_dir, offline, progress)
        model.load_state_dict(tensors, assign=True)
    return model.to(device=device, dtype=dtype).eval()


def _folder(name: str | os.PathLike[str]) -> Path | HubFile | None:
    """The folder or repository that a name stands for; None for the catalog's names."""
    text = os.fspath(name)
    if text in list_models():
        return None  # whatever folders lie about; ./NAME is one of them
    if not isinstance(name, str) or Path(text).expanduser().is_dir():
        return Path(text).expanduser().absolute()
    if "/" in text:
        source = parse(text)
        if isinstance(source, HubFile) and source.file is None:
            return source
        raise CheckpointError(
            f"{text!r} names a file: give it as the checkpoint of a model, "
            "load(NAME, checkpoint=...)"
        )
    return None


def _published(
    folder: Path | HubFile, cache_dir: settings.Home, offline: bool | None, progress: bool
) -> MaskRCNN:
    from vitadapter_zoo.publishing.pretrained import fetch_folder, read_folder

    if isinstance(folder, HubFile):
        with bars(progress) as lines:
            home, without_network = settings.home(cache_dir), settings.is_offline(offline)
            folder = fetch_folder(folder, home, lines(str(folder)), offline=without_network)
    return read_folder(folder)


def _weights(
    row: Row,
    model: MaskRCNN,
    checkpoint: str | os.PathLike[str] | None,
    cache_dir: settings.Home,
    offline: bool | None,
    progress: bool,
) -> dict[str, Tensor]:
    """The tensors for ``model``, float32, from ``checkpoint`` or the row's own source."""
    source = resolve.published(row) if checkpoint is None else parse(checkpoint)
    with bars(progress) as lines:
        paths = resolve.obtain(row, source, lines, cache_dir=cache_dir, offline=offline)
    origin = str(source) if len(paths) > 1 else str(paths[0])
    return convert.fit(containers.read_all(paths, origin), row, model, origin).tensors
