"""Whatever the server does, the result is the right bytes or one clear error."""

import hashlib
import random
import time
from collections.abc import Callable
from pathlib import Path

import faults
import pytest
import safetensors
from faults import Handler, Server, serving
from forked import failure, run, workers
from helpers import left_behind, same_weights
from standins import PHOTO

import vitadapter_zoo
from vitadapter_zoo import DownloadError, ZooError
from vitadapter_zoo.catalog import PUBLISHED
from vitadapter_zoo.weights import cache
from vitadapter_zoo.weights.download import RetryPolicy, download, hash_in_name

NAME = "adapter-t-deit-3x"
DATA = random.Random(0).randbytes(1_000_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
QUICK = RetryPolicy(backoff=0.01, stall=0.3, longest_wait=2)
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
            assert download(server.url, target, retry=QUICK).sha256
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
        faults.answer(520),
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
            fetched = download(server.url, target, SHA256, retry=QUICK)
        except DownloadError:
            assert not target.exists()
            assert set(parts(tmp_path)) <= {"file.part", "file.part.json"}
        else:
            assert fetched.sha256 == SHA256
            assert target.read_bytes() == DATA
        server.faults.clear()
        download(server.url, target, SHA256, retry=QUICK)  # the next start ends well
    assert target.read_bytes() == DATA


def test_temporary_faults_are_retried_and_permanent_ones_are_errors(tmp_path: Path) -> None:
    for number, fault in enumerate(
        (
            faults.stall,
            faults.length_too_large,
            faults.answer(429, Retry_After=0),
            faults.answer(503),
            faults.answer(520),
        )
    ):
        with serving(Server(DATA, [fault])) as server:
            target = tmp_path / str(number)
            assert download(server.url, target, retry=QUICK).sha256 == SHA256
            assert len(server.asked) > 1
    for fault, message in (
        (faults.login_page, "sends a web page"),
        (faults.answer(404), "answers 404"),
        (faults.answer(429, Retry_After=3600), "asks to wait 3600 seconds"),
    ):
        with serving(Server(DATA, [fault])) as server:
            with pytest.raises(DownloadError, match=message):
                download(server.url, tmp_path / "b", retry=QUICK)
            assert len(server.asked) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_waited_for(tmp_path: Path, status: int) -> None:
    with serving(Server(DATA, [faults.answer(status, Retry_After=1)])) as server:
        download(server.url, tmp_path / "file", SHA256, retry=QUICK)
    first, second = server.times
    assert second - first >= 1  # QUICK alone waits for a hundredth of that


def test_a_proxy_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Server(DATA)) as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        # A name that is not anywhere: only the proxy can have answered.
        fetched = download("http://weights.invalid/file.pth", tmp_path / "file", retry=QUICK)
    assert fetched.sha256 == SHA256
    assert len(proxy.asked) == 1


def test_a_download_is_resumed_behind_a_redirect(tmp_path: Path) -> None:
    with serving(Server(DATA, [faults.drop_at(0.5)])) as server:
        there = [faults.answer(302, Location=server.url)] * 2  # as release assets are served
        with serving(Server(b"", [*there])) as front:
            download(front.url, tmp_path / "file", SHA256, retry=QUICK)
    assert server.asked[0] is None
    assert str(server.asked[1]).startswith("bytes=")


def test_a_later_process_requests_only_the_rest(tmp_path: Path) -> None:
    target, once = tmp_path / "file", RetryPolicy(attempts=1)
    with serving(Server(DATA, [faults.drop_at(0.5)])) as server:
        with pytest.raises(DownloadError, match="bytes are kept"):
            download(server.url, target, retry=once)
        kept = (tmp_path / "file.part").stat().st_size
        assert 0 < kept <= len(DATA) // 2
        assert download(server.url, target, retry=once).sha256 == SHA256
    assert server.asked == [None, f"bytes={kept}-"]


FIRST, SECOND = "Mon, 02 Nov 2026 10:00:00 GMT", "Tue, 03 Nov 2026 10:00:00 GMT"


@pytest.mark.parametrize("if_range", [True, False])
@pytest.mark.parametrize("named_by", ["etag", "modified"])
def test_a_file_that_changes_between_attempts_is_not_mixed(
    tmp_path: Path, named_by: str, if_range: bool
) -> None:
    other = DATA[::-1]
    names = {"etag": ('"v1"', '"v2"'), "modified": (FIRST, SECOND)}[named_by]
    server = Server(DATA, etag=None, if_range=if_range)
    setattr(server, named_by, names[0])

    def drop_and_change(handler: Handler) -> None:
        faults.drop_at(0.5)(handler)
        server.data = other
        setattr(server, named_by, names[1])

    server.faults.append(drop_and_change)
    with serving(server):
        download(server.url, tmp_path / "file", retry=QUICK)
    assert (tmp_path / "file").read_bytes() == other
    assert len(server.asked) == (2 if if_range else 3)  # a server that minds it answers at once


def test_a_download_is_resumed_by_last_modified(tmp_path: Path) -> None:
    with serving(Server(DATA, [faults.drop_at(0.5)], etag='W/"1"', modified=FIRST)) as server:
        download(server.url, tmp_path / "file", SHA256, retry=QUICK)
    assert str(server.asked[1]).startswith("bytes=")


@pytest.mark.parametrize("etag", [None, 'W/"v1"'])
def test_without_a_strong_validator_the_download_restarts(tmp_path: Path, etag: str | None) -> None:
    with serving(Server(DATA, [faults.drop_at(0.5)], etag=etag)) as server:
        download(server.url, tmp_path / "file", retry=QUICK)
    assert server.asked == [None, None]
    assert (tmp_path / "file").read_bytes() == DATA


def test_a_damaged_part_is_downloaded_again(tmp_path: Path) -> None:
    target, part = tmp_path / "file", tmp_path / "file.part"
    with serving(Server(DATA, [faults.drop_at(0.5)])) as server:
        with pytest.raises(DownloadError):
            download(server.url, target, retry=RetryPolicy(attempts=1))
        part.write_bytes(bytes(part.stat().st_size))
        assert download(server.url, target, SHA256, retry=QUICK).sha256 == SHA256


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


def test_the_hash_of_a_truncated_file_is_not_recorded(
    published_file: Callable[[str], Path], zoo_home: Path
) -> None:
    with serving(Server(published_file(NAME).read_bytes(), [faults.length_too_small])) as server:
        with pytest.raises(ZooError, match="damaged or truncated"):
            vitadapter_zoo.load(NAME, checkpoint=server.url)
        assert left_behind(zoo_home) == []
        assert same_weights(vitadapter_zoo.load(NAME, checkpoint=server.url), NAME)


def test_a_flipped_byte_is_detected_without_a_published_hash(
    published_file: Callable[[str], Path], zoo_home: Path
) -> None:
    # In the middle of the weights, where every value is a number.
    with serving(Server(published_file(NAME).read_bytes(), [faults.flip_a_byte])) as server:
        with pytest.raises(ZooError, match=r"damaged or truncated torch file \(Bad CRC-32"):
            vitadapter_zoo.load(NAME, checkpoint=server.url)
        assert left_behind(zoo_home) == []
        assert same_weights(vitadapter_zoo.load(NAME, checkpoint=server.url), NAME)


def test_the_first_hash_is_recorded_before_the_entry_is_complete_and_kept(
    published_file: Callable[[str], Path], zoo_home: Path
) -> None:
    with serving(Server(published_file(NAME).read_bytes())) as server:
        place = cache.entry(NAME, server.url)
        in_the_way = place.known_record.with_name(f".{place.known_record.name}.tmp")
        in_the_way.parent.mkdir(parents=True)
        in_the_way.touch()
        with pytest.raises(ZooError, match="cannot write to"):
            vitadapter_zoo.load(NAME, checkpoint=server.url)
        assert place.read() is None
        in_the_way.unlink()
        assert same_weights(vitadapter_zoo.load(NAME, checkpoint=server.url), NAME)
        assert server.asked == [None]  # what had come was not fetched again
        first = place.known()
        assert first
        assert first.sha256 == hashlib.sha256(server.data).hexdigest()
        assert (first.source, first.size, first.etag) == (server.url, len(server.data), '"v1"')
        time.sleep(1)  # dates have seconds
        cache.prune(everything=True)
        vitadapter_zoo.load(NAME, checkpoint=server.url)
        assert place.known() == first  # the first one's date too


def test_offline_mode_sends_no_request(zoo_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Server(DATA)) as server:
        with pytest.raises(DownloadError, match="offline mode: run `vitadapter-zoo download"):
            vitadapter_zoo.load(NAME, checkpoint=server.url, offline=True)
        monkeypatch.setenv("VITADAPTER_ZOO_OFFLINE", "1")
        with pytest.raises(DownloadError, match="is not in the cache"):
            vitadapter_zoo.load(NAME, checkpoint=server.url)
        monkeypatch.delenv("VITADAPTER_ZOO_OFFLINE")
        for command in (
            ["predict", str(PHOTO), "--model", NAME, "--checkpoint", server.url],
            ["download", NAME, "--checkpoint", server.url],
            ["convert", server.url, "--model", NAME, "--out", "none.safetensors"],
        ):
            assert "offline mode" in failure(*command, "--offline")
    assert server.asked == []
    everything = run("download", "--all", "--offline")
    assert everything.returncode == 2
    assert all(f"{row.name}: " in everything.stderr for row in PUBLISHED)
    (packaged,) = everything.stdout.splitlines()  # needs no download
    assert packaged.startswith("adapter-n-emoji: ")


def test_every_command_accepts_a_url(published_file: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    with serving(Server(published_file(NAME).read_bytes())) as server:
        for command in (
            ["download", NAME, "--checkpoint", server.url],
            ["convert", server.url, "--model", NAME, "--out", str(out)],
            ["predict", str(PHOTO), "--model", NAME, "--checkpoint", server.url, "--json"],
        ):
            done = run(*command, cwd=tmp_path)
            assert (done.returncode, done.stderr) == (0, "")  # no bar where there is no terminal
        assert server.asked == [None]
        with safetensors.safe_open(out, "pt") as file:
            # The hash of what was served, not of what the cache made of it.
            digest = hashlib.sha256(server.data).hexdigest()
            assert file.metadata()["source_sha256"] == digest


IN_A_TERMINAL = """
import os, pty, sys
from vitadapter_zoo.cli import main
terminal, ours = pty.openpty()
os.dup2(ours, 2)
os.close(ours)
sys.stderr = open(2, "w", closefd=False)
try:
    main(sys.argv[1:], standalone_mode=False)
finally:
    os.set_blocking(terminal, False)
    output = b""
    try:
        while True:  # one read returns 4 kB at most, which may end within a character
            output += os.read(terminal, 1 << 20)
    except BlockingIOError:
        print("SHOWN", ascii(output.decode())) if output else print("NOTHING")
"""


def test_a_terminal_shows_a_progress_bar_unless_quiet(
    published_file: Callable[[str], Path],
) -> None:
    command = ["download", NAME, "--checkpoint"]
    with serving(Server(published_file(NAME).read_bytes())) as server:
        quiet = workers().run(IN_A_TERMINAL, *command, server.url, "--quiet")
        cache.prune(everything=True)
        shown = workers().run(
            IN_A_TERMINAL, *command, server.url, environment={"TERM": "xterm", "COLUMNS": "200"}
        )
    assert "NOTHING" in quiet.stdout, quiet
    for piece in ("weights", "MB", "MB/s", "0:00:00"):  # name, size, speed, time left
        assert piece in shown.stdout.partition("SHOWN")[2]


def test_a_disk_that_is_too_full_is_an_error_before_the_download(tmp_path: Path) -> None:
    def huge(handler: Handler) -> None:
        handler.head(200, Content_Length=10**15)

    with serving(Server(DATA, [huge])) as server:
        with pytest.raises(ZooError, match=r"disk is too full: 1,000,000,000 MB are needed"):
            download(server.url, tmp_path / "file", retry=QUICK)
    assert parts(tmp_path) == []


FULL = """
import resource, signal, sys
from pathlib import Path
from vitadapter_zoo import ZooError
from vitadapter_zoo.weights.download import download
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    download(sys.argv[1], Path(sys.argv[2]))
except ZooError as error:
    print(error)
"""


def test_a_disk_that_fills_up_leaves_nothing_wrong(tmp_path: Path) -> None:
    with serving(Server(DATA)) as server:
        result = workers().run(FULL, server.url, str(tmp_path / "file"))
        assert "cannot write to" in result.stdout
        assert (tmp_path / "file.part").stat().st_size == 300_000
        assert download(server.url, tmp_path / "file").sha256 == SHA256
    assert server.asked[1] == "bytes=300000-"
