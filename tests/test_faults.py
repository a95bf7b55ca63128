"""Whatever the server does: the right bytes, or one clear error and nothing taken for complete."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import faults
import pytest
from faults import Handler, Server, serving
from helpers import left_behind, same_weights

import vitadapter_zoo
from vitadapter_zoo import DownloadError, ZooError, cache
from vitadapter_zoo.download import Patience, download, hash_in_name

NAME = "adapter-t-deit-3x"
DATA = random.Random(0).randbytes(1_000_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
QUICK = Patience(backoff=0.01, stall=0.3, longest_wait=2)
Fault = Callable[[Handler], None]


def parts(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("ranges", [True, False])
def test_connections_dropped_at_random_bytes(tmp_path: Path, ranges: bool) -> None:
    rng, resumed = random.Random(1), 0
    for round_ in range(20):
        dropped = [faults.random_drop(rng) for _ in range(rng.randint(1, 3))]
        with serving(Server(DATA, [*dropped], ranges=ranges)) as server:
            target = tmp_path / str(round_)
            assert download(server.url, target, patience=QUICK).sha256
            assert target.read_bytes() == DATA
        resumed += sum(asked is not None for asked in server.asked)
    assert resumed > 10


@pytest.mark.parametrize(
    "fault",
    [
        faults.length_too_large,
        faults.length_too_small,
        faults.stall,
        faults.flip_a_byte,
        faults.login_page,
        faults.wrong_range,
        faults.answer(429, Retry_After=0),
        faults.answer(429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
        faults.answer(503),
        faults.answer(404),
        faults.answer(416),
        faults.answer(301, Location="/weights.pth"),
    ],
)
@pytest.mark.parametrize("times", [1, 40])
@pytest.mark.parametrize("begun", [False, True])
def test_the_right_bytes_or_one_error(
    tmp_path: Path, fault: Fault, times: int, begun: bool
) -> None:
    target = tmp_path / "file"
    before: list[Fault] = [faults.drop_at(0.4)] if begun else []
    with serving(Server(DATA, [*before, *[fault] * times])) as server:
        try:
            fetched = download(server.url, target, SHA256, patience=QUICK)
        except DownloadError:
            assert not target.exists()
            assert set(parts(tmp_path)) <= {"file.part", "file.part.json"}
        else:
            assert fetched.sha256 == SHA256
            assert target.read_bytes() == DATA
        server.faults.clear()
        download(server.url, target, SHA256, patience=QUICK)  # the next start ends well
    assert target.read_bytes() == DATA


def test_what_passes_is_survived_and_what_does_not_is_said(tmp_path: Path) -> None:
    survived = [faults.stall, faults.length_too_large, faults.answer(429, Retry_After=0)]
    with serving(Server(DATA, [*survived])) as server:
        assert download(server.url, tmp_path / "a", patience=QUICK).sha256 == SHA256
    for fault, message in (
        (faults.login_page, "sends a web page"),
        (faults.answer(404), "answers 404"),
        (faults.answer(429, Retry_After=3600), "asks to wait 3600 seconds"),
    ):
        with serving(Server(DATA, [fault])) as server:
            with pytest.raises(DownloadError, match=message):
                download(server.url, tmp_path / "b", patience=QUICK)
            assert len(server.asked) == 1


def test_a_later_process_asks_for_the_rest_only(tmp_path: Path) -> None:
    target, once = tmp_path / "file", Patience(attempts=1)
    with serving(Server(DATA, [faults.drop_at(0.5)])) as server:
        with pytest.raises(DownloadError, match="bytes are kept"):
            download(server.url, target, patience=once)
        kept = (tmp_path / "file.part").stat().st_size
        assert 0 < kept <= len(DATA) // 2
        assert download(server.url, target, patience=once).sha256 == SHA256
    assert server.asked == [None, f"bytes={kept}-"]


def test_a_file_that_changes_between_attempts_is_not_mixed(tmp_path: Path) -> None:
    other = DATA[::-1]
    with serving(Server(DATA)) as server:

        def drop_and_change(handler: Handler) -> None:
            faults.drop_at(0.5)(handler)
            server.data, server.etag = other, '"v2"'

        server.faults.append(drop_and_change)
        download(server.url, tmp_path / "file", patience=QUICK)
    assert (tmp_path / "file").read_bytes() == other


@pytest.mark.parametrize("etag", [None, 'W/"v1"'])
def test_without_a_strong_validator_it_starts_afresh(tmp_path: Path, etag: str | None) -> None:
    with serving(Server(DATA, [faults.drop_at(0.5)], etag=etag)) as server:
        download(server.url, tmp_path / "file", patience=QUICK)
    assert server.asked == [None, None]
    assert (tmp_path / "file").read_bytes() == DATA


def test_a_damaged_part_is_noticed_and_fetched_again(tmp_path: Path) -> None:
    target, part = tmp_path / "file", tmp_path / "file.part"
    with serving(Server(DATA, [faults.drop_at(0.5)])) as server:
        with pytest.raises(DownloadError):
            download(server.url, target, patience=Patience(attempts=1))
        part.write_bytes(bytes(part.stat().st_size))
        assert download(server.url, target, SHA256, patience=QUICK).sha256 == SHA256


def test_hashes_in_names() -> None:
    assert hash_in_name("https://x/deit_tiny_patch16_224-a1311bcf.pth") == "a1311bcf"
    assert hash_in_name("https://x/model-20220101.pth") is None  # a date
    assert hash_in_name("https://x/mask_rcnn_3x_coco.pth.tar") is None


def test_a_hash_in_the_name_is_checked(tmp_path: Path, zoo_home: Path) -> None:
    with serving(Server(DATA)) as server:
        url = server.url.replace("weights", "weights-deadbeef")
        with pytest.raises(DownloadError, match="expected deadbeef"):
            vitadapter_zoo.load(NAME, checkpoint=url)
    assert left_behind(zoo_home) == []


def test_a_changed_source_is_an_error_until_it_is_accepted(
    published_file: Callable[[str], Path], zoo_home: Path
) -> None:
    first = published_file(NAME).read_bytes()
    with serving(Server(first)) as server:
        vitadapter_zoo.load(NAME, checkpoint=server.url)
        cache.prune(everything=True)
        server.data = first + b"\0"  # a zip bears a byte behind its end
        with pytest.raises(DownloadError, match="--accept-change") as caught:
            vitadapter_zoo.load(NAME, checkpoint=server.url)
        for data in (first, server.data):
            assert hashlib.sha256(data).hexdigest() in str(caught.value)
        assert cache.listing() == []
        server.data = first
        assert same_weights(vitadapter_zoo.load(NAME, checkpoint=server.url), NAME)


def test_a_truncated_file_without_a_hash_is_not_remembered(
    published_file: Callable[[str], Path], zoo_home: Path
) -> None:
    with serving(Server(published_file(NAME).read_bytes(), [faults.length_too_small])) as server:
        with pytest.raises(ZooError, match="damaged or truncated"):
            vitadapter_zoo.load(NAME, checkpoint=server.url)
        assert left_behind(zoo_home) == []
        assert same_weights(vitadapter_zoo.load(NAME, checkpoint=server.url), NAME)


def test_offline_never_asks(zoo_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Server(DATA)) as server:
        with pytest.raises(DownloadError, match="offline mode: run `vitadapter-zoo download"):
            vitadapter_zoo.load(NAME, checkpoint=server.url, offline=True)
        monkeypatch.setenv("VITADAPTER_ZOO_OFFLINE", "1")
        with pytest.raises(DownloadError, match="is not in the cache"):
            vitadapter_zoo.load(NAME, checkpoint=server.url)
    assert server.asked == []


def test_a_disk_that_is_too_full_is_said_before(tmp_path: Path) -> None:
    def huge(handler: Handler) -> None:
        handler.head(200, Content_Length=10**15)

    with serving(Server(DATA, [huge])) as server:
        with pytest.raises(ZooError, match=r"disk is too full: 1,000,000,000 MB are needed"):
            download(server.url, tmp_path / "file", patience=QUICK)
    assert parts(tmp_path) == []


FULL = """
import resource, signal, sys
from pathlib import Path
from vitadapter_zoo import ZooError
from vitadapter_zoo.download import download
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    download(sys.argv[1], Path(sys.argv[2]))
except ZooError as error:
    print(error)
"""


def test_a_disk_that_fills_up_is_survived(tmp_path: Path) -> None:
    with serving(Server(DATA)) as server:
        command = [sys.executable, "-c", FULL, server.url, str(tmp_path / "file")]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "cannot write to" in result.stdout
        assert (tmp_path / "file.part").stat().st_size == 300_000
        assert download(server.url, tmp_path / "file").sha256 == SHA256
    assert server.asked[1] == "bytes=300000-"


LOAD = """
import sys, vitadapter_zoo
model = vitadapter_zoo.load("adapter-t-deit-3x", checkpoint=sys.argv[1])
print(float(sum(v.double().sum() for v in model.state_dict().values())))
"""


def start(url: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", LOAD, url]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_eight_processes_download_once(published_file: Callable[[str], Path]) -> None:
    with serving(Server(published_file(NAME).read_bytes())) as server:
        running = [start(server.url) for _ in range(8)]
        results = [process.communicate() for process in running]
        assert [process.returncode for process in running] == [0] * 8, results
        assert len({out for out, _ in results}) == 1
        assert server.asked == [None]
        assert same_weights(vitadapter_zoo.load(NAME, checkpoint=server.url), NAME)
    assert server.asked == [None]


OBTAIN = """
import sys
from vitadapter_zoo import get_row, store
from vitadapter_zoo.progress import silent
from vitadapter_zoo.source import parse
row = get_row("adapter-t-deit-3x")
print("ready", flush=True)
for round_ in range(1000):
    sys.stdin.readline()
    store.obtain(row, parse(sys.argv[1]), lambda name: silent)
    print("done", flush=True)
"""


def kill_rounds(rounds: int, data: bytes, home: Path, url_or_path: str, server: Server) -> int:
    """Kill a downloading or converting process at random moments; count those that were hit."""
    rng = random.Random(0)
    hit = 0
    for round_ in range(rounds):
        process = subprocess.Popen(
            [sys.executable, "-c", OBTAIN, url_or_path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("\n")
        process.stdin.flush()
        time.sleep(rng.uniform(0, 0.9))
        os.kill(process.pid, signal.SIGKILL)
        hit += process.communicate()[0] == ""
        for item in cache.listing():
            if item.provenance:  # what counts as complete is complete
                assert item.entry.is_intact(item.provenance), round_
        if round_ % 3 == 2:  # let one finish, and begin anew
            assert same_weights(vitadapter_zoo.load(NAME, checkpoint=url_or_path), NAME), round_
            names = left_behind(home)
            assert not [name for name in names if "download" in name or "tmp" in name], round_
            cache.prune(everything=True)
    assert same_weights(vitadapter_zoo.load(NAME, checkpoint=url_or_path), NAME)
    return hit


@pytest.mark.parametrize("kind", ["download", "convert"])
@pytest.mark.parametrize("rounds", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_processes_leave_nothing_wrong(
    published_file: Callable[[str], Path], zoo_home: Path, rounds: int, kind: str
) -> None:
    data = published_file(NAME).read_bytes()
    with serving(Server(data)) as server:
        source = server.url if kind == "download" else str(published_file(NAME))
        hit = kill_rounds(rounds, data, zoo_home, source, server)
    resumed = sum(asked is not None for asked in server.asked)
    print(f"{kind}: {rounds} kills, {hit} before the end; {resumed} requests went on by Range")
    assert hit


def test_what_a_killed_process_had_not_swept_up_goes_with_the_next_load(
    published_file: Callable[[str], Path], zoo_home: Path
) -> None:
    with serving(Server(published_file(NAME).read_bytes())) as server:
        vitadapter_zoo.load(NAME, checkpoint=server.url)
        (weights,) = zoo_home.rglob("*.safetensors")
        weights.with_suffix(".download.part.json").write_text("{}")
        vitadapter_zoo.load(NAME, checkpoint=server.url)
    assert not [name for name in left_behind(zoo_home) if "download" in name]
