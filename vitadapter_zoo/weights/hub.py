"""Files of the Hugging Face Hub: huggingface_hub downloads and caches them; we check hashes."""

import contextlib
import hashlib
import logging
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from vitadapter_zoo.errors import CheckpointError, DownloadError, OfflineError, ZooError
from vitadapter_zoo.text import shown
from vitadapter_zoo.weights import atomic, cache
from vitadapter_zoo.weights.network import reached_through
from vitadapter_zoo.weights.progress import Report
from vitadapter_zoo.weights.shards import INDEX, SINGLE, shard_names
from vitadapter_zoo.weights.source import WEIGHTS, HubFile

logger = logging.getLogger(__name__)

CONNECT = 5.0  # seconds to open a connection


@dataclass(frozen=True)
class Announced:
    """The metadata of a file on the server: its commit, and the hash that serves as its ETag."""

    commit: str | None
    etag: str | None


@contextlib.contextmanager
def _one_error(source: HubFile) -> Iterator[None]:
    """Turn the exceptions of huggingface_hub into one error with advice.

    Raises:
        DownloadError: absent, not allowed, unreachable, or not cached in offline mode.
    """
    try:
        yield
    except DownloadError:
        raise
    except GatedRepoError as error:
        reason = "its owner has to grant access: ask on its page, then `hf auth login`"
        raise DownloadError(f"cannot download {source}: {reason}") from error
    except RepositoryNotFoundError as error:
        reason = "there is no such repository, or it is private: check the name, or `hf auth login`"
        raise DownloadError(f"cannot download {source}: {reason}") from error
    except RevisionNotFoundError as error:
        reason = f"the repository has no branch, tag or commit {source.revision!r}"
        raise DownloadError(f"cannot download {source}: {reason}") from error
    except RemoteEntryNotFoundError as error:
        raise DownloadError(
            f"cannot download {source}: the repository has no such file; see "
            f"{constants.ENDPOINT}/{source.repo}/tree/{source.revision or 'main'}"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        reason = f"{constants.ENDPOINT} cannot be reached and it is not in the cache"
        raise DownloadError(f"cannot download {source}: {reason}; go online once") from error
    # Other failures are exceptions of huggingface_hub, of its HTTP library, or OSError.
    except Exception as error:
        theirs = type(error).__module__.startswith(("huggingface_hub", "httpx", "httpcore"))
        # hf_xet raises RuntimeError for its own failures.
        if not theirs and not isinstance(error, (OSError, ValueError, RuntimeError)):
            raise
        reason = shown(str(error).strip().partition("\n")[0] or type(error).__name__, 200)
        raise DownloadError(
            f"cannot download {source}: {reason}; check the connection and HF_ENDPOINT "
            f"({constants.ENDPOINT}) and try again"
        ) from error


def is_offline(offline: bool) -> bool:
    """Return whether our offline mode or huggingface_hub's forbids the network."""
    return offline or constants.HF_HUB_OFFLINE


def _unreachable() -> str | None:
    """Return why the Hub, or the proxy in front of it, cannot be reached; None if it can.

    huggingface_hub tries a dead connection five times, for half a minute in all. One attempt to
    open a connection tells a machine without a network at once.
    """
    try:
        address = reached_through(constants.ENDPOINT)
        socket.create_connection(address, timeout=CONNECT).close()
    except OSError as error:
        reason = error.strerror or str(error)
        return f"{constants.ENDPOINT} cannot be reached ({reason}) and it is not in the cache"
    return None


def announced(source: HubFile) -> Announced:
    """Request a file's commit and hash, without its content.

    Raises:
        DownloadError: absent, not allowed, or unreachable.
    """
    reason = _unreachable()
    if reason:
        raise _not_cached(source, reason)
    url = huggingface_hub.hf_hub_url(source.repo, str(source.file), revision=source.revision)
    with _one_error(source):
        metadata = huggingface_hub.get_hf_file_metadata(url)
    return Announced(metadata.commit_hash, metadata.etag)


def choose(source: HubFile, preferred: str | None = None, *, offline: bool = False) -> HubFile:
    """Choose the weights file of a repository, for a name without a file.

    Safetensors under the Hub's usual names have priority, then the file whose name without its
    suffix is ``preferred``, then the only weights file of the repository.

    Raises:
        DownloadError: the repository does not exist or cannot be reached.
        CheckpointError: no weights, or several without a preference.
    """
    if source.file:
        return source
    reason = _reason_offline(offline)
    if reason:
        names = _cached_names(source, reason)
    else:
        with _one_error(source):
            names = huggingface_hub.HfApi().list_repo_files(source.repo, revision=source.revision)
    for name in (SINGLE, INDEX):
        if name in names:
            return replace(source, file=name)
    weights = [name for name in names if name.endswith(WEIGHTS)]
    for name in weights:
        if preferred and PurePosixPath(name).name.partition(".")[0] == preferred:
            return replace(source, file=name)
    if len(weights) == 1:
        return replace(source, file=weights[0])
    have = (
        f"several: {', '.join(shown(name) for name in sorted(weights)[:8])}" if weights else "none"
    )
    raise CheckpointError(
        f"{source} names no weights file and the repository has {have}; name one as {source}/FILE"
    )


def fetch(source: HubFile, home: Path, report: Report, *, offline: bool = False) -> Path:
    """Download one file into huggingface_hub's cache and check it against its announced hash.

    A file that was not modified since its last check is not hashed again.

    Args:
        source: the repository and the file.
        home: our own cache, where the check is recorded.
        report: called with the bytes so far and in total.
        offline: use huggingface_hub's cache only.

    Raises:
        DownloadError: absent, not allowed, unreachable, or with another hash than announced.
    """
    path = _download(source, report, offline=offline)
    if _is_checked(path, home) or _is_announced(path, source, home, offline=offline):
        return path
    if not is_offline(offline):
        path = _download(source, report, offline=False, force=True)
        if _is_announced(path, source, home, offline=False):
            return path
    raise DownloadError(
        f"{source} is not the file that the server announces: sha256 {atomic.sha256(path)}, "
        f"expected {path.resolve().name}; it was damaged in transit or on the server. Try again "
        "later"
    )


def fetch_weights(
    source: HubFile, home: Path, report: Report, *, offline: bool = False
) -> list[Path]:
    """Download a weights file, or all files of an index of shards, as ``fetch`` does."""
    path = fetch(source, home, report, offline=offline)
    if not str(source.file).endswith(".index.json"):
        return [path]
    folder = PurePosixPath(str(source.file)).parent
    return [
        fetch(replace(source, file=str(folder / name)), home, report, offline=offline)
        for name in shard_names(path)
    ]


def commit_of(path: Path) -> str | None:
    """Return the commit of a file in huggingface_hub's cache: ``snapshots/<commit>/<file>``."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


def _cached_names(source: HubFile, reason: str) -> list[str]:
    """Return the files of a repository in huggingface_hub's cache.

    Raises:
        DownloadError: there are none.
    """
    wanted = source.revision or "main"
    cache = constants.HF_HUB_CACHE
    if Path(cache).is_dir():
        for repo in huggingface_hub.scan_cache_dir(cache).repos:
            if (repo.repo_type, repo.repo_id) != ("model", source.repo):
                continue
            for revision in repo.revisions:
                if wanted in {revision.commit_hash, *revision.refs}:
                    folder = revision.snapshot_path
                    return [str(file.file_path.relative_to(folder)) for file in revision.files]
    raise _not_cached(source, reason)


def _reason_offline(offline: bool) -> str | None:
    """Return why a file can only come from the cache; None if the network can be used."""
    if is_offline(offline):
        return "it is not in huggingface_hub's cache, and this is offline mode"
    return _unreachable()


def check_cached(source: HubFile, *, offline: bool) -> None:
    """Refuse a file that is not cached while the Hub cannot, or must not, be used.

    Raises:
        OfflineError: nothing of the repository is in huggingface_hub's cache either.
    """
    repository = f"models--{source.repo.replace('/', '--')}"
    if not (Path(constants.HF_HUB_CACHE) / repository).exists():
        reason = _reason_offline(offline)
        if reason:
            raise _not_cached(source, reason)


def _not_cached(source: HubFile, reason: str) -> OfflineError:
    return OfflineError(
        f"cannot download {source}: {reason}; go online once, check HF_ENDPOINT and the proxy "
        "settings, or pass the path of a local file as the checkpoint"
    )


def _download(source: HubFile, report: Report, *, offline: bool, force: bool = False) -> Path:
    reason = _reason_offline(offline)
    if reason:  # hf_hub_download may ask the server for other things even then
        path = huggingface_hub.try_to_load_from_cache(
            source.repo, str(source.file), revision=source.revision
        )
        if not isinstance(path, str):
            raise _not_cached(source, reason)
        return Path(path)

    class Forwarding(tqdm):
        """Forwards huggingface_hub's progress to our progress bar."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]
            self.done, self.whole = options.get("initial", 0), options.get("total")

        def update(self, n: float | None = 1) -> None:
            self.done += n or 0
            report(int(self.done), self.whole)

    with _one_error(source):
        return Path(
            huggingface_hub.hf_hub_download(
                source.repo,
                str(source.file),
                revision=source.revision,
                library_name="vitadapter-zoo",
                force_download=force,
                tqdm_class=Forwarding,
            )
        )


def _checked_record(path: Path, home: Path) -> cache.Entry:
    return cache.entry("hub", str(path.resolve()), home)


def _is_checked(path: Path, home: Path) -> bool:
    place = _checked_record(path, home)
    known = place.known()
    if known is None:
        return False
    status = path.stat()
    unchanged = status.st_mtime <= place.known_record.stat().st_mtime
    return unchanged and status.st_size == known.size


def _is_announced(path: Path, source: HubFile, home: Path, *, offline: bool) -> bool:
    """Return whether the content has the announced hash: sha256, or git's sha1 for small files."""
    etag = path.resolve().name  # huggingface_hub names its blobs by their ETag
    if len(etag) not in (40, 64) and not is_offline(offline):
        etag = announced(source).etag or ""
    digest = atomic.sha256(path)
    if len(etag) == 64:
        matches = digest == etag
    elif len(etag) == 40:
        matches = _git_hash(path) == etag
    else:
        logger.warning("the server announces no hash of %s; it was not checked", source)
        matches = True
    if matches:
        known = cache.Known(str(source), digest, path.stat().st_size, etag, atomic.now())
        try:
            _checked_record(path, home).remember(known)
        except ZooError as error:
            logger.info("the hash of %s could not be recorded: %s", source, error)
    return matches


def _git_hash(path: Path) -> str:
    content = path.read_bytes()  # git hashes files that are not in LFS: small ones
    header = b"blob %d\0" % len(content)
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()
