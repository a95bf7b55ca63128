"""Downloads into the cache: good and bad answers, retries, several files at once."""

import contextlib
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from forked import COMMAND, workers
from helpers import left_behind, same_weights
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

import vitadapter_zoo
from vitadapter_zoo import CheckpointError, DownloadError, ZooError
from vitadapter_zoo.weights import cache
from vitadapter_zoo.weights.download import download

NAME = "adapter-t-deit-3x"
MakeFile = Callable[[str], Path]


def test_download_from_a_server(
    httpserver: HTTPServer, published_file: MakeFile, zoo_home: Path
) -> None:
    served = []

    def serve(request: Request) -> Response:
        served.append(request.path)
        return Response(published_file(NAME).read_bytes(), mimetype="application/octet-stream")

    httpserver.expect_request("/v0.1.2/weights.pth.tar").respond_with_handler(serve)
    httpserver.expect_request("/latest").respond_with_response(
        Response(status=302, headers={"Location": httpserver.url_for("/v0.1.2/weights.pth.tar")})
    )
    url = httpserver.url_for("/latest")
    assert same_weights(vitadapter_zoo.load(NAME, checkpoint=url), NAME)
    assert same_weights(vitadapter_zoo.load(NAME, checkpoint=url), NAME)
    assert served == ["/v0.1.2/weights.pth.tar"]
    provenance = cache.entry(NAME, url).read()
    assert provenance is not None
    assert provenance.source == url
    assert len(left_behind(zoo_home)) == 3  # weights, provenance, the source's first hash


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (Response("no", status=404), "answers 404"),
        (Response("<html>log in</html>", mimetype="text/html"), "sends a web page"),
        (Response("<html>log in</html>", mimetype="application/zip"), "sends a web page"),
        (Response("", status=302, headers={"Location": "/file.pth"}), "Exceeded 30 redirects"),
    ],
)
def test_bad_answers_leave_nothing(
    httpserver: HTTPServer, response: Response, message: str, zoo_home: Path
) -> None:
    httpserver.expect_request("/file.pth").respond_with_response(response)
    with pytest.raises(ZooError, match=message) as caught:
        vitadapter_zoo.load(NAME, checkpoint=httpserver.url_for("/file.pth"))
    assert isinstance(caught.value, (DownloadError, CheckpointError))
    assert left_behind(zoo_home) == []


def test_a_truncated_response_is_an_error(published_file: MakeFile, zoo_home: Path) -> None:
    class CutShort(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = published_file(NAME).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:100_000])

    with ThreadingHTTPServer(("127.0.0.1", 0), CutShort) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/file.pth"
        with pytest.raises(DownloadError, match=r"cannot download http://.*100000 bytes read"):
            vitadapter_zoo.load(NAME, checkpoint=url)
        server.shutdown()
    assert left_behind(zoo_home) == []


def test_an_unreachable_server_is_an_error(zoo_home: Path) -> None:
    with pytest.raises(DownloadError, match=r"download http://127\.0\.0\.1:9/x\.pth: .*refused"):
        vitadapter_zoo.load(NAME, checkpoint="http://127.0.0.1:9/x.pth")
    assert left_behind(zoo_home) == []


def test_a_busy_server_is_retried(httpserver: HTTPServer, tmp_path: Path) -> None:
    httpserver.expect_ordered_request("/busy").respond_with_data("later", status=503)
    httpserver.expect_ordered_request("/busy").respond_with_data("content")
    digest = download(httpserver.url_for("/busy"), tmp_path / "file").sha256
    assert (tmp_path / "file").read_text() == "content"
    httpserver.expect_ordered_request("/busy").respond_with_data("content")
    with pytest.raises(DownloadError, match=f"sha256 {digest}, expected 00"):
        download(httpserver.url_for("/busy"), tmp_path / "other", sha256="00")
    assert not (tmp_path / "other").exists()


@contextlib.contextmanager
def as_github(files: dict[str, bytes], folder: Path) -> Iterator[tuple[dict[str, str], list[str]]]:
    """A proxy that answers for https://github.com; the environment that leads there, and a log.

    No file is sent before all of them were asked for.
    """
    certificate = folder / "github.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=github.com",
         "-addext", "subjectAltName=DNS:github.com",
         "-keyout", str(certificate), "-out", str(folder / "public.pem")],
        check=True, capture_output=True,
    )  # fmt: skip
    certificate.write_bytes(certificate.read_bytes() + (folder / "public.pem").read_bytes())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    together = threading.Barrier(len(files))
    log: list[str] = []

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Log nothing."""

        def do_CONNECT(self) -> None:
            log.append(f"CONNECT {self.path}")
            self.send_response(200)
            self.end_headers()
            self.connection = context.wrap_socket(self.connection, server_side=True)
            self.rfile, self.wfile = (self.connection.makefile(mode) for mode in ("rb", "wb"))
            self.handle_one_request()
            self.wfile.flush()
            self.close_connection = True

        def do_GET(self) -> None:
            log.append(f"GET {self.path}")
            data = files[self.path.rpartition("/")[2]]
            together.wait(60)
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        proxy = f"http://127.0.0.1:{server.server_port}"
        trusted = str(folder / "public.pem")
        yield {"https_proxy": proxy, "no_proxy": "", "REQUESTS_CA_BUNDLE": trusted}, log
        server.shutdown()


def test_published_files_are_downloaded_in_parallel(
    published_file: MakeFile, tmp_path: Path, zoo_home: Path
) -> None:
    names = [NAME, "vit-t-deit-3x"]
    files = {
        vitadapter_zoo.get_row(name).checkpoint_url.rpartition("/")[2]: published_file(
            name
        ).read_bytes()
        for name in names
    }
    with as_github(files, tmp_path) as (environment, log):
        done = workers().run(COMMAND, "download", *names, environment=environment)
    assert done.returncode == 0, done.stderr
    assert sorted(log)[:2] == ["CONNECT github.com:443"] * 2
    assert len(log) == 4
    for name in names:
        assert same_weights(vitadapter_zoo.load(name, offline=True), name)
