"""From a source to local safetensors files: download, check, convert, cache."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from vitadapter_zoo import settings
from vitadapter_zoo._version import __version__
from vitadapter_zoo.catalog import Row
from vitadapter_zoo.errors import CheckpointError, DownloadError, ZooError
from vitadapter_zoo.weights import atomic, cache, checkpoint, convert, presence
from vitadapter_zoo.weights.progress import Report
from vitadapter_zoo.weights.shards import shard_names
from vitadapter_zoo.weights.source import HubFile, LocalFile, Source, Url, parse

logger = logging.getLogger(__name__)

# Adds a progress bar for a file name.
Lines: TypeAlias = Callable[[str], Report]


def obtain(
    row: Row,
    source: Source,
    lines: Lines,
    *,
    cache_dir: settings.Home = None,
    offline: bool | None = None,
    accept_change: bool = False,
    allow_nonfinite: bool = False,
) -> list[Path]:
    """Return the local safetensors file of ``row`` from ``source``, or its shards.

    Safetensors are used in place: a local file, or a file in huggingface_hub's cache. Other
    formats are converted once and stored in our cache.

    Args:
        row: the row that the weights must fit.
        source: the origin of the weights.
        lines: adds a progress bar for a file name.
        cache_dir: our cache.
        offline: True never uses the network; None asks the environment.
        accept_change: accept that the source's content differs from its first download.
        allow_nonfinite: accept NaN and infinite weights.

    Raises:
        DownloadError: the source cannot be downloaded, is not the published file, has changed, or
            is not cached in offline mode.
        CheckpointError: the file is damaged, unsafe, or does not hold the row's weights.
        ZooError: the cache cannot be written to.
    """
    without_network = settings.is_offline(offline)
    if isinstance(source, LocalFile):
        in_place = as_they_are(source.path)
        if in_place:
            return in_place
    place = cache.entry(row.name, str(source), cache_dir)
    if _is_current(place, row, source, without_network):
        _remove_download(place)
        return [place.weights]
    if isinstance(source, HubFile):
        return _from_hub(
            row, source, place, lines, offline=without_network, allow_nonfinite=allow_nonfinite
        )
    if isinstance(source, Url) and without_network:
        raise presence.offline_error(row, source, place)
    with place.locked():
        if _is_current(place, row, source, without_network):
            pass  # another process has converted it
        elif isinstance(source, LocalFile):
            _from_file(row, source, place, allow_nonfinite=allow_nonfinite)
        else:
            _from_url(
                row, source, place, lines, accept_change=accept_change,
                allow_nonfinite=allow_nonfinite,
            )  # fmt: skip
    return [place.weights]


def as_they_are(path: Path) -> list[Path] | None:
    """Return the safetensors files of a local path, shards included; None for a pickle."""
    if path.name.endswith(".index.json"):
        return [path.parent / name for name in shard_names(path)]
    return [path] if checkpoint.is_safetensors(path) else None


def source_sha256(paths: list[Path]) -> str:
    """Return the hash of the source of files from ``obtain`` or ``as_they_are``.

    For a conversion in our cache it is the hash of the original file; for shards it is defined by
    ``atomic.sha256_of_all``.
    """
    home = settings.home()
    converted = cache.Entry(home, paths[0]).read() if paths[0].is_relative_to(home) else None
    return converted.source_sha256 if converted else atomic.sha256_of_all(paths)


def published(row: Row) -> Source:
    """Return the source that the catalog names.

    Raises:
        CheckpointError: the file belongs to this package and is missing.
    """
    source = parse(row.checkpoint_url)
    if isinstance(source, LocalFile) and not source.path.is_file():
        raise CheckpointError(
            f"the weights of {row.name} are missing from the package ({source.path}): install "
            "vitadapter-zoo again"
        )
    return source


def _is_current(place: cache.Entry, row: Row, source: Source, offline: bool) -> bool:
    """Return whether the cache holds complete weights of the source's current content."""
    provenance = place.read()
    if provenance is None:
        return False
    if place.is_touched(provenance) and not place.is_intact(provenance):
        logger.warning("%s was damaged after it was written; it is converted again", place.weights)
        return False
    if isinstance(source, LocalFile):
        status = source.path.stat()
        known = (provenance.source_size, provenance.source_mtime_ns)
        return known == (status.st_size, status.st_mtime_ns)
    if isinstance(source, Url):
        return True
    from vitadapter_zoo.weights import hub

    fixed = source.pinned or provenance.source_sha256 == _expected(row, source)
    if fixed or hub.is_offline(offline) or source.file is None:
        return fixed or source.file is not None
    try:
        return hub.announced(source).etag == provenance.etag
    except DownloadError as error:
        logger.warning("%s; the file from %s in the cache is used", error, provenance.date)
        return True


def _expected(row: Row, source: Source) -> str | None:
    """Return the sha256 that is published for a source, or its first digits."""
    if row.sha256 and source == published(row):
        return row.sha256
    from vitadapter_zoo.weights.download import hash_in_name

    return hash_in_name(str(source))


def _from_hub(
    row: Row,
    source: HubFile,
    place: cache.Entry,
    lines: Lines,
    *,
    offline: bool,
    allow_nonfinite: bool,
) -> list[Path]:
    from vitadapter_zoo.weights import hub

    chosen = hub.choose(source, row.config.removesuffix(".py"), offline=offline)
    if chosen != source:
        place = cache.entry(row.name, str(chosen), place.home)
        if _is_current(place, row, chosen, offline):
            return [place.weights]
    report = lines(str(chosen.file))
    with place.locked():
        if _is_current(place, row, chosen, offline):
            return [place.weights]
        paths = hub.fetch_weights(chosen, place.home, report, offline=offline)
        if checkpoint.is_safetensors(paths[0]):
            return paths
        digest = atomic.sha256(paths[0])
        expected = _expected(row, chosen)
        if expected and not digest.startswith(expected):
            raise DownloadError(
                f"{chosen} is not the published file: sha256 {digest}, expected {expected}; it "
                "was changed. To use it anyway, pass its path as the checkpoint: "
                f"{paths[0]}"
            )
        etag, commit = paths[0].resolve().name, hub.commit_of(paths[0])
        place.write(
            _convert(
                row, chosen, place, paths[0], digest, etag=etag, commit=commit,
                allow_nonfinite=allow_nonfinite,
            )
        )  # fmt: skip
    return [place.weights]


def _from_file(row: Row, source: LocalFile, place: cache.Entry, *, allow_nonfinite: bool) -> None:
    digest = atomic.sha256(source.path)
    place.write(_convert(row, source, place, source.path, digest, allow_nonfinite=allow_nonfinite))


def _from_url(
    row: Row,
    source: Url,
    place: cache.Entry,
    lines: Lines,
    *,
    accept_change: bool,
    allow_nonfinite: bool,
) -> None:
    from vitadapter_zoo.weights.download import download

    expected = _expected(row, source)
    with atomic.writing_to(place.home):
        place.download.parent.mkdir(parents=True, exist_ok=True)
    report = lines(place.weights.stem.rpartition(".zoo-")[0])
    fetched = download(source.url, place.download, expected, report=report)
    known = place.known()
    try:
        if known and known.sha256 != fetched.sha256 and not accept_change:
            raise DownloadError(
                f"{source} has changed since {known.date}: it had {known.size:,} bytes with sha256 "
                f"{known.sha256}, now it has {fetched.size:,} bytes with sha256 {fetched.sha256}. "
                f"If the change is intended, accept it: `vitadapter-zoo download {row.name} "
                f"--checkpoint {source} --accept-change`"
            )
        provenance = _convert(
            row, source, place, place.download, fetched.sha256, etag=fetched.etag,
            allow_nonfinite=allow_nonfinite,
        )  # fmt: skip
    except (CheckpointError, DownloadError):
        atomic.discard_download(place.download)  # the next attempt must ask the server again
        raise
    # The hash is recorded after the conversion, which fails for a wrong file, and before the entry
    # is complete: a process killed in between has recorded the hash of a good file, or nothing.
    if expected is None and (known is None or known.sha256 != fetched.sha256):
        place.remember(fetched)
    place.write(provenance)
    atomic.discard_download(place.download)


def _remove_download(place: cache.Entry) -> None:
    """Remove the download of a process that was killed before it removed it."""
    record = atomic.part_record_of(place.download)
    if record.exists() and os.access(record.parent, os.W_OK):
        atomic.discard_download(place.download)


def _convert(
    row: Row,
    source: Source,
    place: cache.Entry,
    path: Path,
    digest: str,
    *,
    allow_nonfinite: bool,
    etag: str | None = None,
    commit: str | None = None,
) -> cache.Provenance:
    """Write the entry's weights; returns the provenance, which the caller must write after them."""
    status = path.stat()
    done = convert.to_safetensors(
        [path], str(source), row, place.weights, sha256=digest, allow_nonfinite=allow_nonfinite
    )
    if isinstance(source, LocalFile) and path.stat().st_mtime_ns != status.st_mtime_ns:
        place.weights.unlink()
        raise ZooError(f"{path} was written to while it was converted; try again")
    written = place.weights.stat()
    return cache.Provenance(
        model=row.name,
        source=str(source),
        source_sha256=digest,
        source_size=status.st_size,
        source_mtime_ns=status.st_mtime_ns if isinstance(source, LocalFile) else None,
        container=done.container,
        sha256=atomic.sha256(place.weights),
        size=written.st_size,
        mtime_ns=written.st_mtime_ns,
        date=atomic.now(),
        tool_version=__version__,
        etag=etag,
        commit=commit,
        cast=done.cast,
        filled=done.filled,
        removed=done.removed,
        metadata=done.metadata,
    )
