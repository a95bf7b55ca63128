"""A real HTTP file server that misbehaves in the ways that real ones do."""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Server:
    """What is served, how, and what was asked for.

    Attributes:
        data: the file.
        faults: one per request, in turn; when they are used up the server behaves.
        etag: validator of the file; None sends none.
        modified: the file's Last-Modified; None sends none.
        ranges: whether Range is understood.
        if_range: whether If-Range is: servers that do not know it send the range regardless.
        asked: the Range of every request, None where there was none.
        times: when each request came, in seconds.
    """

    data: bytes
    faults: list[Callable[["Handler"], None]] = field(default_factory=list)
    etag: str | None = '"v1"'
    modified: str | None = None
    ranges: bool = True
    if_range: bool = True
    asked: list[str | None] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/weights.pth"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""

    def do_GET(self) -> None:
        self.close_connection = True
        self.files.asked.append(self.headers.get("Range"))
        self.files.times.append(time.monotonic())
        fault = self.files.faults.pop(0) if self.files.faults else behave
        with contextlib.suppress(ConnectionError):
            fault(self)

    def head(self, status: int = 200, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def file_head(self, length: int | None = None) -> bytes:
        """Send the head for the whole file or the range asked for; return its bytes."""
        files = self.files
        wanted = self.headers.get("Range")
        named = {"ETag": files.etag, "Last-Modified": files.modified}
        extra = {name: value for name, value in named.items() if value}
        condition = self.headers.get("If-Range")  # without it, a range is sent of any file
        met = not files.if_range or condition is None or condition in extra.values()
        if wanted and files.ranges and met:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            body = files.data[start:]
            place = f"bytes {start}-{len(files.data) - 1}/{len(files.data)}"
            self.head(206, Content_Length=len(body), Content_Range=place, **extra)
            return body
        self.head(200, Content_Length=length or len(files.data), **extra)
        return files.data


def behave(handler: Handler) -> None:
    handler.wfile.write(handler.file_head())


def drop_at(fraction: float) -> Callable[[Handler], None]:
    """End the connection after that part of what was asked for."""

    def fault(handler: Handler) -> None:
        body = handler.file_head()
        handler.wfile.write(body[: int(len(body) * fraction)])

    return fault


def random_drop(rng: random.Random) -> Callable[[Handler], None]:
    return drop_at(rng.random())


def answer(status: int, **headers: object) -> Callable[[Handler], None]:
    return lambda handler: handler.head(status, Content_Length=0, **headers)


def length_too_large(handler: Handler) -> None:
    handler.wfile.write(handler.file_head(len(handler.files.data) + 1000))


def length_too_small(handler: Handler) -> None:
    handler.wfile.write(handler.file_head(len(handler.files.data) // 2))


def stall(handler: Handler) -> None:
    body = handler.file_head()
    handler.wfile.write(body[: len(body) // 2])
    handler.wfile.flush()
    threading.Event().wait(3)


def login_page(handler: Handler) -> None:
    page = b"<!DOCTYPE html><html>Please log in</html>"
    handler.head(200, Content_Length=len(page), Content_Type="application/octet-stream")
    handler.wfile.write(page)


def flip_a_byte(handler: Handler) -> None:
    body = bytearray(handler.file_head())
    body[len(body) // 2] ^= 1
    handler.wfile.write(body)


def wrong_range(handler: Handler) -> None:
    size = len(handler.files.data)
    handler.head(206, Content_Length=10, Content_Range=f"bytes 0-9/{size}", ETag='"v1"')
    handler.wfile.write(handler.files.data[:10])


@contextlib.contextmanager
def serving(server: Server) -> Iterator[Server]:
    handler = type("Bound", (Handler,), {"files": server})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.daemon_threads = True
        server.port = running.server_port
        threading.Thread(target=running.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            running.shutdown()
