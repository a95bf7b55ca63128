"""From a name to a ready detector: download, convert, cache, build, assign."""

import datetime
import hashlib
import logging
import os
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from vitadapter_zoo import __version__, cache, checkpoint
from vitadapter_zoo.catalog import ROWS, Row, get_row
from vitadapter_zoo.errors import CheckpointError, ZooError
from vitadapter_zoo.models import MaskRCNN, build

logger = logging.getLogger(__name__)


def load(
    name: str,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    pretrained: bool = True,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> MaskRCNN:
    """Load a detector in evaluation mode.

    The first call downloads the row's published file, converts it to safetensors and keeps that in
    the cache; later calls map the converted file into memory.

    Args:
        name: load name, see ``vitadapter_zoo.list_models()``.
        checkpoint: a local ``.pth``, ``.pth.tar`` or ``.safetensors`` file, or an http(s) URL;
            the row's own URL by default. Local files are never altered.
        pretrained: False gives fresh weights (training from scratch) and reads no file.
        device: where the detector lives.
        dtype: floating-point type of the weights; float32, as stored, by default.
        cache_dir: where converted weights are kept; ``$VITADAPTER_ZOO_HOME`` or the platform's
            cache directory by default.

    Raises:
        UnknownModelError: no such name; the message offers the nearest.
        DownloadError: the file cannot be fetched, or is not the published one.
        CheckpointError: the file is damaged, unsafe, or not a checkpoint of this model.
        ZooError: the cache cannot be written to.
        ValueError: ``checkpoint`` together with ``pretrained=False``.
    """
    row = get_row(name)
    if not pretrained:
        if checkpoint is not None:
            raise ValueError("pretrained=False takes no checkpoint: leave one of them out")
        with torch.device(device):
            model = build(row)
    else:
        # Built without memory; the file's tensors then become the parameters themselves.
        with torch.device("meta"):
            model = build(row)
        model.load_state_dict(_weights(row, model, checkpoint, cache_dir), assign=True)
    return model.to(device=device, dtype=dtype).eval()


def _weights(
    row: Row,
    model: MaskRCNN,
    source: str | os.PathLike[str] | None,
    cache_dir: str | os.PathLike[str] | None,
) -> dict[str, Tensor]:
    """The tensors for ``model``, float32, from ``source`` or the row's own URL."""
    origin = row.checkpoint_url if source is None else os.fspath(source)
    if not cache.is_url(origin):
        path = Path(origin).expanduser().absolute()
        if not path.is_file():
            raise CheckpointError(f"there is no checkpoint file {path}")
        if checkpoint.is_safetensors(path):
            return _fit(checkpoint.read(path, origin), row, model, origin).tensors
        origin = str(path)
    place = cache.entry(row.name, origin, cache_dir)
    if not _is_current(place, origin):
        with place.locked():
            if not _is_current(place, origin):  # another process may have made it meanwhile
                _convert(row, model, origin, place)
    return _fit(checkpoint.read(place.weights, str(place.weights)), row, model, origin).tensors


def _is_current(place: cache.Entry, origin: str) -> bool:
    """Whether the entry is complete and, for a local file, made from its present state."""
    provenance = place.read()
    if provenance is None or cache.is_url(origin):
        return provenance is not None
    status = Path(origin).stat()
    known = (provenance.source_size, provenance.source_mtime_ns)
    return known == (status.st_size, status.st_mtime_ns)


def _convert(row: Row, model: MaskRCNN, origin: str, place: cache.Entry) -> None:
    """Fetch ``origin`` if it is a URL, and write its weights to the cache as safetensors."""
    if cache.is_url(origin):
        from vitadapter_zoo.download import download

        with cache.temporary(place.home) as fetched:
            digest = download(origin, fetched, row.sha256 if origin == row.checkpoint_url else None)
            _convert_file(row, model, origin, fetched, digest, place)
    else:
        path = Path(origin)
        _convert_file(row, model, origin, path, _sha256(path), place)


def _convert_file(
    row: Row, model: MaskRCNN, origin: str, path: Path, digest: str, place: cache.Entry
) -> None:
    status = path.stat()
    loaded = checkpoint.read(path, origin)
    fitted = _fit(loaded, row, model, origin)
    with cache.replacing(place.weights) as partial:
        try:
            safetensors.torch.save_file(
                fitted.tensors,
                partial,
                {
                    "format": "pt",
                    "model": row.name,
                    "source_sha256": digest,
                    "license": row.license,
                },
            )
        except safetensors.SafetensorError as error:  # its word for a full disk too
            raise ZooError(
                f"cannot write the converted weights to {place.weights.parent}: {error}"
            ) from error
        size = partial.stat().st_size
    place.write_record(
        cache.Provenance(
            model=row.name,
            source=origin,
            source_sha256=digest,
            source_size=status.st_size,
            source_mtime_ns=None if cache.is_url(origin) else status.st_mtime_ns,
            container=loaded.container,
            size=size,
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            tool_version=__version__,
            cast=fitted.cast,
            filled=fitted.filled,
            metadata=loaded.metadata,
        )
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _fit(
    loaded: checkpoint.Checkpoint, row: Row, model: MaskRCNN, origin: str
) -> checkpoint.Fitted:
    """``checkpoint.fit`` with the catalog's knowledge in its error: which row would fit."""
    try:
        fitted = checkpoint.fit(loaded.tensors, model.state_dict(), row.name)
    except CheckpointError as error:
        hint = _what_it_is(loaded.tensors)
        raise CheckpointError(f"{origin}: {error}{hint}") from error
    if fitted.filled:
        logger.warning(
            "%s lacks %d parameters that change nothing (%s, ...): filled",
            origin,
            len(fitted.filled),
            fitted.filled[0],
        )
    return fitted


def _what_it_is(tensors: dict[str, Tensor]) -> str:
    if any(name.startswith("neck.lateral_convs.0.bn.") for name in tensors):
        return (
            "\nThis looks like the older adapter-l file of release v0.1.2 (BatchNorm in neck and "
            "heads, 50.9 / 44.8 AP), which the published link has replaced: use v0.3.1"
        )
    fitting = []
    for row in ROWS:
        with torch.device("meta"):
            candidate = build(row)
        try:
            checkpoint.fit(tensors, candidate.state_dict(), row.name)
        except CheckpointError:
            continue
        fitting.append(row.name)
    return f"\nThe file fits {' or '.join(fitting)}: load it under that name" if fitting else ""
