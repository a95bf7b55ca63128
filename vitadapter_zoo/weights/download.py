"""Download one file over HTTP, completely or not at all, with resume after lost connections.

The bytes are written to ``<target>.part``. ``<target>.part.json`` records the URL and the
validators, so that a later call, in this process or another, requests only the rest (Range with
If-Range). A part is removed if the server sends no validator,
because such a download cannot be resumed.
"""

import email.utils
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

import requests

from vitadapter_zoo.errors import DownloadError, OfflineError, ZooError
from vitadapter_zoo.text import read_json, shown
from vitadapter_zoo.weights import atomic
from vitadapter_zoo.weights.cache import LARGEST_RECORD, Known
from vitadapter_zoo.weights.network import NO_NETWORK
from vitadapter_zoo.weights.progress import Report, silent

CHUNK = 1 << 16  # bytes; a lost connection loses at most these
RETRY_STATUSES = (408, 425, 429)  # temporary errors, in addition to every 5xx
HASH_IN_NAME = re.compile(r"-(?=\d*[a-f])([0-9a-f]{8,64})\.(?:pth|pt|bin|npz|safetensors)\b")


@dataclass(frozen=True)
class RetryPolicy:
    """When to repeat a failed request, and when to give up.

    Attributes:
        attempts: consecutive failures without a new byte before giving up.
        failures: total failures before giving up.
        backoff: seconds before the second attempt; doubled for each further one.
        longest_wait: seconds; a longer Retry-After is an error.
        connect: seconds to connect.
        stall: seconds without any data after which a connection counts as lost.
    """

    attempts: int = 4
    failures: int = 100
    backoff: float = 0.5
    longest_wait: float = 120
    connect: float = 10
    stall: float = 30


DEFAULT_RETRY = RetryPolicy()


@dataclass(frozen=True)
class _RemoteFile:
    """The identity of a file as the server announced it."""

    url: str
    total: int | None
    etag: str | None
    modified: str | None

    @property
    def validator(self) -> str | None:
        """Return the value for If-Range; weak ETags do not identify a file."""
        weak = self.etag is None or self.etag.startswith("W/")
        return self.modified if weak else self.etag

    def differs(self, headers: Mapping[str, str]) -> bool:
        """Return whether a Range response is of another file: some servers ignore If-Range."""
        named = (headers.get("ETag"), headers.get("Last-Modified"))
        known = (self.etag, self.modified)
        return any(
            new != old for new, old in zip(named, known, strict=True) if new is not None and old
        )


class _InterruptedError(Exception):
    """An attempt failed with a temporary error."""

    def __init__(self, reason: str, wait: float | None = None, *, no_network: bool = False) -> None:
        super().__init__(reason)
        self.wait = wait
        self.no_network = no_network  # the server's name or address cannot be found from here


class _Part:
    """The bytes of an incomplete download, with their running hash."""

    def __init__(self, target: Path, url: str) -> None:
        self.path = atomic.part_of(target)
        self.record = atomic.part_record_of(target)
        self.announced: _RemoteFile | None = None
        self.digest = hashlib.sha256()
        self.size = 0
        self._resume(url)

    def _resume(self, url: str) -> None:
        try:
            announced = _RemoteFile(**read_json(self.record, LARGEST_RECORD))
            size = self.path.stat().st_size
        except (OSError, ValueError, TypeError):
            self.drop()
            return
        fits = announced.total is None or size <= announced.total
        if announced.url != url or announced.validator is None or not fits:
            self.drop()
            return
        self.digest = atomic.hashed(self.path)
        self.announced, self.size = announced, size

    def begin(self, announced: _RemoteFile) -> None:
        """Start from the first byte."""
        self.drop()
        self.announced = announced
        self.record.write_text(json.dumps(asdict(announced), indent=2) + "\n")
        self.path.touch()

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)
        self.record.unlink(missing_ok=True)
        self.announced, self.digest, self.size = None, hashlib.sha256(), 0

    def drop_unless_resumable(self) -> None:
        if self.announced is None or self.announced.validator is None:
            self.drop()

    def finish(self, target: Path) -> None:
        """Rename the file; the record stays in case the process dies before it uses the file."""
        with self.path.open("rb") as written:
            os.fsync(written.fileno())
        self.path.replace(target)


def download(
    url: str,
    target: Path,
    sha256: str | None = None,
    *,
    report: Report = silent,
    retry: RetryPolicy = DEFAULT_RETRY,
) -> Known:
    """Download ``url`` into ``target``, which exists only once it is complete.

    After lost connections, stalls and temporary errors the download is resumed. Proxies come from
    the environment. Only one process may download into a target at a time: the caller must hold a
    lock.

    Args:
        url: http or https.
        target: file to write; the part is stored next to it.
        sha256: the expected hash or its first digits, if known.
        report: called with the bytes so far and in total.
        retry: the retry policy.

    Raises:
        DownloadError: unreachable, refused, truncated, a web page, or a wrong hash.
        ZooError: the disk is full or cannot be written to.
    """
    finished = _finished(url, target, sha256)
    if finished:
        return finished
    part = _Part(target, url)
    resumed = part.size > 0
    with requests.Session() as session:
        _fetch(session, url, part, report, retry)
        if resumed and not _is(part, sha256):
            part.drop()  # the part may have been damaged: start again from the first byte
            _fetch(session, url, part, report, retry)
    digest, size = part.digest.hexdigest(), part.size
    if not _is(part, sha256):
        part.drop()
        raise DownloadError(
            f"{url} is not the published file: sha256 {digest}, expected {sha256}; the file was "
            "changed or damaged in transit. To use it anyway, download it yourself and pass its "
            "path as the checkpoint"
        )
    etag = part.announced.etag if part.announced else None
    with atomic.writing_to(target.parent):
        part.finish(target)
    return Known(url, digest, size, etag, atomic.now())


def _finished(url: str, target: Path, sha256: str | None) -> Known | None:
    """The complete download of a process that died before it used it; other files are removed."""
    try:
        announced = _RemoteFile(**read_json(atomic.part_record_of(target), LARGEST_RECORD))
        status = target.stat()
    except (OSError, ValueError, TypeError):
        announced = None
    digest = atomic.sha256(target) if announced and announced.url == url else ""
    if announced and digest and digest.startswith(sha256 or ""):
        return Known(url, digest, status.st_size, announced.etag, atomic.time_of(status.st_mtime))
    target.unlink(missing_ok=True)
    return None


def hash_in_name(url: str) -> str | None:
    """Return the first digits of the sha256 in a name like ``deit_tiny-a1311bcf.pth``."""
    name = unquote(urlparse(url).path).rpartition("/")[2]
    found = HASH_IN_NAME.search(name)
    return found[1] if found else None


def _is(part: _Part, sha256: str | None) -> bool:
    return sha256 is None or part.digest.hexdigest().startswith(sha256.lower())


def _fetch(
    session: requests.Session, url: str, part: _Part, report: Report, retry: RetryPolicy
) -> None:
    """Repeat requests until the part is complete or the policy gives up."""
    in_a_row, furthest = 0, part.size
    for failures in range(1, retry.failures + 1):
        try:
            _attempt(session, url, part, report, retry)
            return
        except _InterruptedError as error:
            in_a_row = 1 if part.size > furthest else in_a_row + 1
            furthest = max(furthest, part.size)
            wait = retry.backoff * 2 ** (in_a_row - 1) if error.wait is None else error.wait
            if error.no_network and not part.size and failures == 1:
                reason = str(error)
            elif wait > retry.longest_wait:
                reason = f"{error}, and asks to wait {wait:.0f} seconds"
            elif in_a_row < retry.attempts and failures < retry.failures:
                time.sleep(wait)
                continue
            else:
                reason = str(error)
            part.drop_unless_resumable()
            kept = f" The first {part.size:,} bytes are kept." if part.size else ""
            kind = OfflineError if error.no_network else DownloadError
            raise kind(
                f"cannot download {url}: {reason}; check the connection and the address and try "
                f"again, or pass the path of a local file as the checkpoint.{kept}"
            ) from error
        except (requests.RequestException, ValueError) as error:
            part.drop_unless_resumable()
            raise DownloadError(
                f"cannot download {url}: {_reason(error)}; check the address, "
                "or pass the path of a local file as the checkpoint"
            ) from error


def _attempt(
    session: requests.Session, url: str, part: _Part, report: Report, retry: RetryPolicy
) -> None:
    """Send one request for the missing bytes."""
    known = part.announced
    if known and known.total is not None and part.size == known.total:
        return  # a process died after the last byte
    headers = {"Accept-Encoding": "identity"}  # ranges count the bytes of the file itself
    if known and known.validator and part.size:
        headers |= {"Range": f"bytes={part.size}-", "If-Range": known.validator}
    timeout = (retry.connect, retry.stall)
    try:
        with session.get(url, stream=True, timeout=timeout, headers=headers) as response:
            total = _prepare(response, url, part)
            _receive(response, part, total, report)
    except requests.exceptions.SSLError:
        raise
    except (
        requests.ConnectionError,
        requests.Timeout,
        requests.exceptions.ChunkedEncodingError,
        requests.exceptions.ContentDecodingError,
    ) as error:
        cause = _innermost(error)
        unreachable = isinstance(cause, OSError) and cause.errno in NO_NETWORK
        raise _InterruptedError(_reason(error), no_network=unreachable) from error


def _prepare(response: requests.Response, url: str, part: _Part) -> int | None:
    """Check the response's header and prepare the part; return the file's size if known."""
    status = response.status_code
    if status in RETRY_STATUSES or status >= 500:
        raise _InterruptedError(
            f"it answers {status} {shown(response.reason)}", _retry_after(response)
        )
    if status == 416:
        part.drop()
        raise _InterruptedError("it cannot resume the download")
    if status not in (200, 206):
        login = ", or log in (requests reads ~/.netrc)" if status in (401, 403) else ""
        raise DownloadError(
            f"{url} answers {status} {shown(response.reason)}; check the address{login}, "
            "or download the file yourself and pass its path as the checkpoint"
        )
    if "html" in response.headers.get("Content-Type", ""):
        raise _web_page(url)
    if status == 206:
        expected = part.announced.total if part.announced else None
        answered = re.fullmatch(
            r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", "").strip()
        )
        start, total = (int(answered[1]), int(answered[2])) if answered else (-1, -1)
        if start != part.size or expected not in (None, total):
            part.drop()
            raise _InterruptedError("it sends another range than requested")
        if part.announced and part.announced.differs(response.headers):
            part.drop()
            raise _InterruptedError("the file changed while it was downloaded")
        atomic.check_space(part.path.parent, total - part.size)
        return total
    # requests decodes compressed transfers: their length and ETag are not the file's.
    decoded = "Content-Encoding" in response.headers
    length = response.headers.get("Content-Length", "")
    announced = int(length) if length.isdigit() and not decoded else None
    atomic.check_space(part.path.parent, announced or 0)
    etag, modified = response.headers.get("ETag"), response.headers.get("Last-Modified")
    with atomic.writing_to(part.path.parent):
        part.begin(_RemoteFile(url, announced, *((None, None) if decoded else (etag, modified))))
    return announced


def _receive(response: requests.Response, part: _Part, total: int | None, report: Report) -> None:
    with atomic.writing_to(part.path.parent):
        file = part.path.open("ab", buffering=0)
    with file:
        report(part.size, total)
        for chunk in response.iter_content(CHUNK):
            if not part.size and _is_html(chunk):
                part.drop()
                raise _web_page(response.url)
            _write(file, chunk, part)
            report(part.size, total)
    if total is not None and part.size < total:
        raise _InterruptedError(f"it ended after {part.size:,} of {total:,} bytes")
    if total is not None and part.size > total:
        size = part.size
        part.drop()
        raise _InterruptedError(f"it sent {size:,} bytes instead of {total:,}")


def _write(file: io.FileIO, chunk: bytes, part: _Part) -> None:
    try:
        with atomic.writing_to(part.path.parent):
            rest = memoryview(chunk)
            while rest:  # a raw file may write less than it is given
                rest = rest[file.write(rest) :]
    except ZooError:
        part.drop_unless_resumable()
        raise
    part.digest.update(chunk)
    part.size += len(chunk)


def _is_html(head: bytes) -> bool:
    return head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml"))


def _web_page(url: str) -> DownloadError:
    return DownloadError(
        f"{shown(url, 300)} sends a web page (HTML), not weights: perhaps a login or error page; "
        "open it in a browser, download the file and pass its path as the checkpoint"
    )


def _retry_after(response: requests.Response) -> float | None:
    """Return the seconds to wait, from either form of Retry-After."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, date.timestamp() - time.time())


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return error


def _reason(error: BaseException) -> str:
    """Return the message of the innermost cause, which is the most specific."""
    cause = _innermost(error)
    return shown(str(cause) or type(cause).__name__, 200)
