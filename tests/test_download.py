import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import left_behind, same_weights
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

import vitadapter_zoo
from vitadapter_zoo import CheckpointError, DownloadError, ZooError, cache
from vitadapter_zoo.download import download

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


def test_a_connection_that_ends_early_is_said(published_file: MakeFile, zoo_home: Path) -> None:
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


def test_an_unreachable_server_is_said(zoo_home: Path) -> None:
    with pytest.raises(DownloadError, match=r"download http://127\.0\.0\.1:9/x\.pth: .*refused"):
        vitadapter_zoo.load(NAME, checkpoint="http://127.0.0.1:9/x.pth")
    assert left_behind(zoo_home) == []


def test_a_busy_server_is_asked_again(httpserver: HTTPServer, tmp_path: Path) -> None:
    httpserver.expect_ordered_request("/busy").respond_with_data("later", status=503)
    httpserver.expect_ordered_request("/busy").respond_with_data("content")
    digest = download(httpserver.url_for("/busy"), tmp_path / "file").sha256
    assert (tmp_path / "file").read_text() == "content"
    httpserver.expect_ordered_request("/busy").respond_with_data("content")
    with pytest.raises(DownloadError, match=f"sha256 {digest}, expected 00"):
        download(httpserver.url_for("/busy"), tmp_path / "other", sha256="00")
    assert not (tmp_path / "other").exists()
