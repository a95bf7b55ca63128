"""The cache of converted weights, with a record of the origin of each file.

Layout::

    <home>/adapter-t-deit-3x/mask_rcnn_..._coco.zoo-1a2b3c4d.safetensors   the weights
    <home>/adapter-t-deit-3x/mask_rcnn_..._coco.zoo-1a2b3c4d.json          their origin
    <home>/adapter-t-deit-3x/mask_rcnn_..._coco.zoo-1a2b3c4d.download*     an incomplete download
    <home>/.sources/mask_rcnn_..._coco.zoo-1a2b3c4d.json                   the source's first sha256
    <home>/.locks/                                                         held during a write

``<home>`` is ``$VITADAPTER_ZOO_HOME``, else the platform's cache directory. The eight hexadecimal
digits are a hash of the source's path or URL, so files of the same name do not collide. The prefix
``.zoo-`` marks the files of the cache, because the user may point it at a folder with other files.
This module does not need torch.
"""

import contextlib
import hashlib
import logging
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote, urlparse

from filelock import FileLock, Timeout

from vitadapter_zoo import settings
from vitadapter_zoo.catalog import PUBLISHED
from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.text import read_json
from vitadapter_zoo.weights import atomic

logger = logging.getLogger(__name__)

LARGEST_RECORD = 16 << 20  # bytes
LOCKS = ".locks"  # folder of the lock files

# Only files of this form are ever removed: the folder may hold the user's own files too.
OWN_FILE = re.compile(
    r"\.?(.+\.zoo-[0-9a-f]{8})\.(?:safetensors|json|download|download\.part|download\.part\.json)"
    r"(?:\.tmp)?"
)


@dataclass(frozen=True)
class Provenance:
    """The origin of one converted file.

    Attributes:
        model: load name of the row.
        source: URL, ``hf://`` name or absolute path that the weights came from.
        source_sha256: hash of the source file.
        source_size: its size in bytes.
        source_mtime_ns: modification time of a local source; None for a download.
        container: what the source file was: torch zip, legacy torch pickle or safetensors.
        sha256: hash of the converted file.
        size: its size in bytes.
        mtime_ns: its modification time; while size and time are unchanged, the hash is trusted.
        date: when it was converted, ISO 8601, UTC.
        tool_version: version of vitadapter-zoo that converted it.
        etag: the server's ETag for the source, if it sent one.
        commit: the Hub's commit that the source came from.
        cast: dtypes that were converted, with the number of tensors of each.
        filled: parameters absent from the source that were filled in.
        removed: prefixes that were removed from names, such as ``module.``.
        metadata: the training framework's plain metadata (versions, epoch).
    """

    model: str
    source: str
    source_sha256: str
    source_size: int
    source_mtime_ns: int | None
    container: str
    sha256: str
    size: int
    mtime_ns: int
    date: str
    tool_version: str
    etag: str | None = None
    commit: str | None = None
    cast: dict[str, int] = field(default_factory=dict)
    filled: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    metadata: dict[str, str | int | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Known:
    """The content of a download. The first download is recorded if no hash is published.

    Attributes:
        source: its URL or ``hf://`` name.
        sha256: of its content.
        size: in bytes.
        etag: the server's ETag for this content, if it sent one.
        date: when it was downloaded, ISO 8601, UTC.
    """

    source: str
    sha256: str
    size: int
    etag: str | None
    date: str


@dataclass(frozen=True)
class Entry:
    """The files in the cache for one source of one model."""

    home: Path
    weights: Path

    @property
    def record(self) -> Path:
        """The JSON with the file's provenance."""
        return self.weights.with_suffix(".json")

    @property
    def download(self) -> Path:
        """The downloaded source file, before its conversion."""
        return self.weights.with_suffix(".download")

    @property
    def known_record(self) -> Path:
        """The JSON with the source's first hash; it is kept when the weights are removed."""
        return self.home / ".sources" / self.record.name

    def read(self) -> Provenance | None:
        """The provenance, or None if the entry is absent, incomplete or unreadable."""
        try:
            provenance = Provenance(**read_json(self.record, LARGEST_RECORD))
            complete = self.weights.stat().st_size == provenance.size
        except (OSError, ValueError, TypeError):
            return None  # a damaged entry is converted again
        return provenance if complete else None

    def is_touched(self, provenance: Provenance) -> bool:
        """Whether the weights were written or copied after they were hashed."""
        return self.weights.stat().st_mtime_ns != provenance.mtime_ns

    def is_intact(self, provenance: Provenance) -> bool:
        """Whether the weights still have their hash.

        The new modification time of an intact copy is recorded if the cache is writable.
        """
        if atomic.sha256(self.weights) != provenance.sha256:
            return False
        if self.is_touched(provenance):
            try:
                self.write(replace(provenance, mtime_ns=self.weights.stat().st_mtime_ns))
            except ZooError as error:
                logger.info("the hash of %s could not be recorded: %s", self.weights, error)
        return True

    def write(self, provenance: Provenance) -> None:
        """Write the provenance, which completes the entry."""
        atomic.write_json(self.record, asdict(provenance))

    def known(self) -> Known | None:
        """The record of the first download of this source; None before it."""
        if not self.known_record.exists():
            return None
        try:
            return Known(**read_json(self.known_record, LARGEST_RECORD))
        except (ValueError, TypeError) as error:
            raise ZooError(
                f"the record of the source's hash {self.known_record} cannot be read ({error}); "
                "delete it to accept the source's content again"
            ) from error

    def remember(self, known: Known) -> None:
        """Record the hash that every later download of this source must have."""
        atomic.write_json(self.known_record, asdict(known))

    @contextlib.contextmanager
    def locked(self, *, wait: bool = True) -> Iterator[None]:
        """Hold the entry's lock while it is written.

        Raises:
            ZooError: the cache cannot be written to, or ``wait`` is False and another process
                holds the lock.
        """
        with locked(self.home, self.weights.stem, wait=wait):
            yield


@contextlib.contextmanager
def locked(root: Path, name: str, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a name; the lock of a killed process is released."""
    path = root / LOCKS / f"{name}.lock"
    with atomic.writing_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout as error:
            raise ZooError(f"{name} is in use by another process; try again later") from error
    try:
        yield
    finally:
        lock.release()


def entry(model: str, source: str, cache_dir: settings.Home = None) -> Entry:
    """The entry for the weights of ``model`` from ``source`` (URL or absolute path)."""
    filename = Path(unquote(urlparse(source).path)).name if "://" in source else Path(source).name
    stem = filename.removesuffix(".tar").rpartition(".")[0] or filename or "weights"
    root = settings.home(cache_dir)
    return Entry(root, root / model / f"{stem}.zoo-{digest(source)}.safetensors")


def digest(text: str) -> str:
    """The first eight hexadecimal digits of the sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Listed:
    """An entry of the cache as ``cache list`` shows it.

    Attributes:
        entry: its files.
        size: bytes on the disk, of the weights or of an incomplete download.
        provenance: None for an unfinished download or a damaged entry.
        state: ``complete``, ``unfinished`` or ``damaged``.
    """

    entry: Entry
    size: int
    provenance: Provenance | None
    state: str


def listing(cache_dir: settings.Home = None) -> list[Listed]:
    """The entries of the cache, by model and name; empty if there is no cache."""
    root = settings.home(cache_dir)
    stems = {
        (directory, stem)
        for row in PUBLISHED
        if (directory := root / row.name).is_dir()
        for path in directory.iterdir()
        if (stem := _stem(path))
    }
    places = [Entry(root, directory / f"{stem}.safetensors") for directory, stem in stems]
    listed = []
    for place in sorted(places, key=lambda place: place.weights):
        provenance = place.read()
        size = sum(path.stat().st_size for path in _all_files(place))
        unfinished = not (place.weights.exists() or place.record.exists())
        state = "complete" if provenance else "unfinished" if unfinished else "damaged"
        listed.append(Listed(place, size, provenance, state))
    return listed


def _stem(path: Path) -> str | None:
    """The name of the entry that a file belongs to; None for other files."""
    found = OWN_FILE.fullmatch(path.name)
    return found[1] if found else None


def _all_files(place: Entry) -> list[Path]:
    return [path for path in place.weights.parent.iterdir() if _stem(path) == place.weights.stem]


def prune(
    older_than: float | None = None, *, everything: bool = False, cache_dir: settings.Home = None
) -> list[Listed]:
    """Remove unfinished and damaged entries, and old or all entries on request.

    The recorded hashes of sources are kept, so that a changed source is still detected. Entries
    that another process is writing are skipped.

    Args:
        older_than: seconds; complete weights of a greater age are removed too.
        everything: remove complete weights of any age.
        cache_dir: as for ``load``.

    Returns:
        The removed entries.

    Raises:
        ZooError: the cache cannot be written to.
    """
    removed = []
    for item in listing(cache_dir):
        place = item.entry
        if item.provenance and not everything:
            age = time.time() - place.record.stat().st_mtime
            if older_than is None or age < older_than:
                continue
        try:
            with place.locked(wait=False):
                _remove(place)
        except ZooError as error:
            if isinstance(error.__cause__, Timeout):
                continue
            raise
        removed.append(item)
    return removed


def _remove(place: Entry) -> None:
    with atomic.writing_to(place.weights.parent):
        # The record is removed first: without it the entry is not complete.
        place.record.unlink(missing_ok=True)
        for path in _all_files(place):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        if not any(place.weights.parent.iterdir()):
            place.weights.parent.rmdir()
