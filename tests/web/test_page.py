"""The web demo, driven in Debian's Chromium as a user drives it."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from forked import run
from PIL import Image

from vitadapter_zoo import get_row
from vitadapter_zoo.web.app import QUEUE

CHROMIUM = shutil.which("chromium")
FILES = get_row("adapter-n-emoji").data_files
assert FILES is not None
PICTURE = FILES[1] / "000046.jpg"
SECONDS = 120_000  # milliseconds that a slow machine may take for one step


class Proxy:
    """A proxy that records and refuses every connection."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            with connection:
                self.requests.append(connection.recv(200).partition(b"\r\n")[0])
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")


class Server:
    """``vitadapter-zoo serve`` in a process of its own, without a way out."""

    def __init__(self, folder: Path, proxy: Proxy) -> None:
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        proxies = {key: proxy.url for name in names for key in (name, name.lower())}
        local = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost")
        command = [sys.executable, "-m", "vitadapter_zoo.cli", "serve", "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--max-megabytes", "1"],
            env={**os.environ, **proxies, **local, "TMPDIR": str(self.temporary)},
            cwd=folder,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.url = line.split()[0].rstrip("/")
        assert self.url.startswith("http://127.0.0.1:"), line


@pytest.fixture
def proxy() -> Proxy:
    return Proxy()


@pytest.fixture
def server(tmp_path: Path, proxy: Proxy) -> Iterator[Server]:
    running = Server(tmp_path, proxy)
    yield running
    running.process.kill()
    running.process.wait()


def upload(page: Any, path: Path) -> None:
    """Replace the uploaded file by another one."""
    if page.get_by_label("Clear").count():
        page.get_by_label("Clear").first.click()
        page.get_by_text("Drop a picture, or").wait_for(timeout=SECONDS)
    page.set_input_files("input[type=file]", path)


def rows(page: Any, number: int) -> list[list[str]]:
    """Return the table as soon as it has that many lines."""
    page.wait_for_function(
        f"document.querySelectorAll('.zoo-table tbody tr').length === {number}", timeout=SECONDS
    )
    lines = page.locator(".zoo-table tbody tr").all()
    return [line.locator("td").all_inner_texts() for line in lines]


def expected() -> list[tuple[str, float]]:
    import vitadapter_zoo

    found = vitadapter_zoo.load("adapter-n-emoji").predict(PICTURE, 0.05)[0]
    return list(zip(found.class_names, found.scores.tolist(), strict=True))


def check_result(page: Any, folder: Path) -> None:
    """Picture, labels, table, slider and download agree with `predict`."""
    scored = expected()
    shown = [(name, f"{score:.2f}") for name, score in scored if score >= 0.3]
    upload(page, PICTURE)
    assert [(row[0], row[1]) for row in rows(page, len(shown))] == shown
    best = page.locator(f"[aria-label='{shown[0][0]} {shown[0][1]}']")
    label = best.locator("span")
    assert not label.is_visible()
    best.focus()
    assert label.is_visible()
    assert page.locator(".zoo-picture img").evaluate("image => image.naturalWidth") > 100
    less = [name for name, score in scored if score >= 0.6]
    assert 0 < len(less) < len(shown)
    page.get_by_role("slider").fill("0.6")
    rows(page, len(less))
    with page.expect_download(timeout=SECONDS) as download:
        page.get_by_text("Download COCO JSON").click()
    assert download.value.suggested_filename == "000046.json"
    results = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    ids = [get_row("adapter-n-emoji").classes.index(name) + 1 for name in less]
    assert [result["category_id"] for result in results] == ids
    assert {result["image_id"] for result in results} == {46}
    assert all(result["segmentation"]["counts"] for result in results)


def check_refusals(page: Any, folder: Path) -> None:
    """An invalid picture, too many bytes and too many pixels are refused with a sentence."""
    bad = folder / "<b>bad.jpg"
    bad.write_text("no picture at all")
    upload(page, bad)
    page.get_by_text("is not a picture that can be read").wait_for(timeout=SECONDS)
    assert page.locator("#picture b").count() == 0
    assert page.locator(".zoo-table").count() == 0
    large = folder / "large.png"
    Image.new("1", (10_000, 6_000)).save(large)
    upload(page, large)
    page.get_by_text("more than 50 million pixels").wait_for(timeout=SECONDS)
    big = folder / "big.jpg"
    big.write_bytes(bytes(1 << 21))
    upload(page, big)
    page.get_by_text("exceed the maximum allowed size").wait_for(timeout=SECONDS)


def check_queue(url: str) -> None:
    """Requests beyond the queue's length are refused, not kept."""
    config = requests.get(f"{url}/config", timeout=60).json()
    with PICTURE.open("rb") as file:
        sent = requests.post(f"{url}/gradio_api/upload", files={"files": file}, timeout=60).json()
    picture = {"path": sent[0], "orig_name": "a.jpg", "meta": {"_type": "gradio.FileData"}}
    heavy = next(one["id"] for one in config["dependencies"] if len(one["inputs"]) == 3)
    answers = []
    for number in range(QUEUE + 6):
        body = {"data": [picture, "adapter-n-emoji", 0.3], "fn_index": heavy}
        body["session_hash"] = f"session{number}"
        answer = requests.post(f"{url}/gradio_api/queue/join", json=body, timeout=60)
        answers.append((answer.status_code, answer.text))
    refused = [text for status, text in answers if status == 503]
    assert refused
    assert "Queue is full" in refused[0]
    assert len(refused) < len(answers)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium; `.ci/run` installs it")
def test_the_page_in_a_browser(server: Server, proxy: Proxy, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    asked: list[str] = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server.url, timeout=SECONDS)
        check_result(page, tmp_path)
        page.set_viewport_size({"width": 375, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") == 375
        table = page.locator(".zoo-scroll")
        assert table.evaluate("it => it.scrollWidth <= it.clientWidth")
        check_refusals(page, tmp_path)
        page.get_by_text("Try the sample picture").click()
        page.locator(".zoo-table tbody tr").first.wait_for(timeout=SECONDS)
        browser.close()
    own = re.compile(rf"{re.escape(server.url)}/|data:|blob:")
    assert [url for url in asked if not own.match(url)] == []
    check_queue(server.url)
    assert list(server.temporary.iterdir())
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    assert list(server.temporary.iterdir()) == []
    assert proxy.requests == []


def test_a_port_that_is_taken_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("serve", "--port", port)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in done.stderr
    assert "Traceback" not in done.stderr
