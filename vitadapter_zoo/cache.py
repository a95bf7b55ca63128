"""Where converted weights are kept, and what is known of each file.

Layout, readable by a person::

    <home>/adapter-t-deit-3x/mask_rcnn_..._coco-1a2b3c4d.safetensors   the weights
    <home>/adapter-t-deit-3x/mask_rcnn_..._coco-1a2b3c4d.json          where they came from
    <home>/.locks/                                                     held while a file is made

``<home>`` is ``$VITADAPTER_ZOO_HOME``, else the platform's cache directory. The eight digits come
from the source's path or URL, so that files of the same name do not collide. Nothing here needs
torch.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlparse

import platformdirs
from filelock import FileLock

from vitadapter_zoo.errors import ZooError


@dataclass(frozen=True)
class Provenance:
    """What is known of one converted file.

    Attributes:
        model: load name of the row.
        source: URL or absolute path that the weights came from.
        source_sha256: hash of the source file.
        source_size: its size in bytes.
        source_mtime_ns: modification time of a local source; None for a download.
        container: what the source file was: torch zip, legacy torch pickle or safetensors.
        size: size of the converted file in bytes.
        date: when it was converted, ISO 8601, UTC.
        tool_version: version of vitadapter-zoo that converted it.
        cast: dtypes that were turned into float32, with how many tensors each.
        filled: parameters absent from the source that were filled in.
        metadata: the training framework's plain metadata (versions, epoch).
    """

    model: str
    source: str
    source_sha256: str
    source_size: int
    source_mtime_ns: int | None
    container: str
    size: int
    date: str
    tool_version: str
    cast: dict[str, int] = field(default_factory=dict)
    filled: list[str] = field(default_factory=list)
    metadata: dict[str, str | int | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """The place in the cache for one source of one model."""

    home: Path
    weights: Path

    @property
    def record(self) -> Path:
        """The JSON with the file's provenance."""
        return self.weights.with_suffix(".json")

    def read(self) -> Provenance | None:
        """The provenance, or None where the entry is absent, incomplete or not readable."""
        try:
            provenance = Provenance(**json.loads(self.record.read_text()))
            complete = self.weights.stat().st_size == provenance.size
        except (OSError, ValueError, TypeError):
            return None  # a damaged entry is made anew
        return provenance if complete else None

    def write_record(self, provenance: Provenance) -> None:
        """Write the provenance; the entry counts as complete from here on."""
        with replacing(self.record) as partial:
            partial.write_text(json.dumps(asdict(provenance), indent=2) + "\n")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the entry against other processes while it is made.

        Raises:
            ZooError: the cache cannot be written to.
        """
        path = self.home / ".locks" / f"{self.weights.stem}.lock"
        with _writing_to(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def home(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The cache's directory: the argument, else ``$VITADAPTER_ZOO_HOME``, else the platform's."""
    chosen = cache_dir or os.environ.get("VITADAPTER_ZOO_HOME")
    return Path(chosen or platformdirs.user_cache_dir("vitadapter-zoo", appauthor=False)).resolve()


def entry(model: str, source: str, cache_dir: str | os.PathLike[str] | None = None) -> Entry:
    """The place for the weights of ``model`` that come from ``source`` (URL or absolute path)."""
    filename = Path(unquote(urlparse(source).path)).name if is_url(source) else Path(source).name
    stem = filename.removesuffix(".tar").rpartition(".")[0] or filename or "weights"
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    root = home(cache_dir)
    return Entry(root, root / model / f"{stem}-{digest}.safetensors")


def is_url(source: str) -> bool:
    """Whether a checkpoint's name is an http(s) URL rather than a path."""
    return source.startswith(("http://", "https://"))


@contextlib.contextmanager
def _writing_to(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ZooError(
            f"cannot write to {directory}: {error.strerror or error}; free some space there, or "
            "choose another place with VITADAPTER_ZOO_HOME or cache_dir"
        ) from error


@contextlib.contextmanager
def temporary(directory: Path) -> Iterator[Path]:
    """An empty file in ``directory`` that is removed at the end, if it is still there.

    Raises:
        ZooError: the directory cannot be written to, or the disk is full.
    """
    with _writing_to(directory):
        directory.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=directory, prefix=".partial-")
        os.close(handle)
        try:
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary file beside ``target`` that takes its place when the block succeeds.

    It is flushed to disk before the rename, and removed if the block fails.

    Raises:
        ZooError: the directory cannot be written to, or the disk is full.
    """
    with temporary(target.parent) as partial:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.chmod(0o644)  # temporary files are private; a cache may be shared
        partial.replace(target)
