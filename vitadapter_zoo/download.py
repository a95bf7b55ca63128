"""Fetch one file over HTTP, whole or not at all."""

import hashlib
import sys
from pathlib import Path
from urllib.parse import urlparse

import requests
from requests.adapters import HTTPAdapter
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from urllib3.util import Retry

from vitadapter_zoo.errors import DownloadError

CHUNK = 1 << 20
TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of data
RETRIES = Retry(
    total=3,
    backoff_factor=0.5,
    status_forcelist=(429, 500, 502, 503, 504),
    allowed_methods=("GET",),
    raise_on_status=False,
)


def download(url: str, target: Path, sha256: str | None = None) -> str:
    """Download ``url`` into ``target`` and return its sha256.

    A progress bar is shown on stderr where that is a terminal. ``target`` may be left incomplete
    when an error is raised: it is the caller's temporary file.

    Args:
        url: http or https.
        target: file to write.
        sha256: the hash that the file must have, where it is known.

    Raises:
        DownloadError: unreachable, refused, cut short, a web page, or another hash.
        OSError: the file cannot be written.
    """
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=RETRIES))
    try:
        with session, session.get(url, stream=True, timeout=TIMEOUT) as response:
            if response.status_code != 200:
                raise DownloadError(
                    f"{url} answers {response.status_code} {response.reason}; check the address, "
                    "or download the file yourself and pass its path as the checkpoint"
                )
            if "html" in response.headers.get("Content-Type", ""):
                raise DownloadError(
                    f"{url} sends a web page (HTML), not weights: a login or error page perhaps; "
                    "open it in a browser, download the file and pass its path as the checkpoint"
                )
            digest, received = _receive(response, target, Path(urlparse(url).path).name)
            # Compressed transfers are decoded on the way, so their length says nothing.
            announced = response.headers.get("Content-Length")
            encoded = "Content-Encoding" in response.headers
    except (requests.RequestException, ValueError) as error:
        raise DownloadError(
            f"cannot download {url}: {_reason(error)}; check the connection and the address, "
            "or pass the path of a local file as the checkpoint"
        ) from error
    if announced and not encoded and received != int(announced):
        raise DownloadError(
            f"{url} ended after {received:,} of {int(announced):,} bytes; try again"
        )
    if sha256 and digest != sha256:
        raise DownloadError(
            f"{url} is not the published file: sha256 {digest}, expected {sha256}; the file was "
            "changed or damaged on its way. To use it all the same, download it yourself and pass "
            "its path as the checkpoint"
        )
    return digest


def _receive(response: requests.Response, target: Path, name: str) -> tuple[str, int]:
    digest = hashlib.sha256()
    received = 0
    total = int(response.headers.get("Content-Length", 0)) or None
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
    with progress, target.open("wb") as file:
        task = progress.add_task(name, total=total)
        for chunk in response.iter_content(CHUNK):
            file.write(chunk)
            digest.update(chunk)
            received += len(chunk)
            progress.update(task, advance=len(chunk))
    return digest.hexdigest(), received


def _reason(error: Exception) -> str:
    """The innermost cause, which is the one that a person can do something about."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return str(error) or type(error).__name__
