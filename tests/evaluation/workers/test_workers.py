import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import scenes
from forked import heed_interrupts

import vitadapter_zoo
from vitadapter_zoo import DatasetError, ImageError, MaskRCNN, Verification, ZooError
from vitadapter_zoo.evaluation.dataset import Image, coco_paths, read_dataset
from vitadapter_zoo.evaluation.options import Options
from vitadapter_zoo.evaluation.run import PREDICTIONS, ImageResult, Run
from vitadapter_zoo.evaluation.workers.pool import Events, Pool, Spec
from vitadapter_zoo.evaluation.workers.processes import ProcessWorker

PICTURES = 14
Watch = Callable[[Run, Sequence[Image]], None]


@pytest.fixture(scope="module")
def coco(small: MaskRCNN, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.write_coco(tmp_path_factory.mktemp("coco"), small, PICTURES)


@pytest.fixture(scope="module")
def alone(folder: Path, coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Verification:
    """What one process finds."""
    return vitadapter_zoo.verify(folder, coco, threads=1, run=tmp_path_factory.mktemp("run"))


def check_same(found: Verification, alone: Verification, run: Path) -> None:
    """The digits of one process, each image written once."""
    assert found.results == alone.results
    assert (found.box.figures, found.mask.figures) == (alone.box.figures, alone.mask.figures)
    assert found.details["identity"] == alone.details["identity"]
    assert (run / PREDICTIONS).read_bytes().count(b"\n") == PICTURES


def after(count: int, act: Callable[[], object]) -> Watch:
    """Act once, when so many results are there."""

    def watch(run: Run, images: Sequence[Image]) -> None:
        if len(run.results) == count:
            act()

    return watch


def the_workers() -> list[BaseProcess]:
    return list(multiprocessing.active_children())


def signal_one(number: signal.Signals) -> None:
    pid = the_workers()[0].pid
    assert pid is not None
    os.kill(pid, number)


def test_two_processes_give_the_digits_of_one(
    small: MaskRCNN, coco: Path, alone: Verification, tmp_path: Path
) -> None:
    counts: list[int] = []

    def count(run: Run, images: Sequence[Image]) -> None:
        counts.append(len(the_workers()))

    found = vitadapter_zoo.verify(small, coco, workers=2, threads=1, run=tmp_path, watch=count)
    assert max(counts) == found.details["workers"] == 2
    check_same(found, alone, tmp_path)
    assert not the_workers()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_hangs_loses_no_image_and_none_is_counted_twice(
    number: signal.Signals, folder: Path, coco: Path, alone: Verification, tmp_path: Path
) -> None:
    disturb = after(3, lambda: signal_one(number))
    found = vitadapter_zoo.verify(folder, coco, workers=2, threads=1, run=tmp_path, watch=disturb)
    check_same(found, alone, tmp_path)
    assert not the_workers()


def spec_for(folder: Path, coco: Path) -> Spec:
    data = read_dataset(*coco_paths(coco))
    return Spec(str(folder), data, Options(threads=1))


def test_an_image_that_ends_three_workers_is_named(folder: Path, coco: Path) -> None:
    images = read_dataset(*coco_paths(coco)).images
    spec, deadly, kept = spec_for(folder, coco), images[1], list[ImageResult]()

    class Fragile(ProcessWorker):
        def send(self, image: Image) -> None:
            super().send(image)
            if image == deadly:
                self.stop()

    with Pool(lambda events: Fragile(spec, events), 1) as pool:
        with pytest.raises(ZooError, match=f"{deadly.path.name} was in flight in each of 3"):
            pool.evaluate(images, kept.append)
    # Those that were in flight beside it ran alone from then on.
    ids = [result.image_id for result in kept]
    assert len(set(ids)) == len(ids)
    assert {images[0].image_id, images[2].image_id} <= set(ids)
    assert deadly.image_id not in ids


def test_a_second_answer_does_not_count(folder: Path, coco: Path) -> None:
    images = read_dataset(*coco_paths(coco)).images
    spec, kept = spec_for(folder, coco), list[ImageResult]()

    class Twice(ProcessWorker):
        def send(self, image: Image) -> None:
            super().send(image)
            super().send(image)

    with Pool(lambda events: Twice(spec, events), 1) as pool:
        pool.evaluate(images, kept.append)
    assert sorted(result.image_id for result in kept) == [image.image_id for image in images]


def test_workers_that_cannot_be_started_are_one_error(folder: Path, coco: Path) -> None:
    spec, started = spec_for(folder, coco), []

    class Stillborn(ProcessWorker):
        def __init__(self, spec: Spec, events: Events) -> None:
            super().__init__(spec, events)
            started.append(self.name)
            self.stop()

    with Pool(lambda events: Stillborn(spec, events), 2) as pool:
        with pytest.raises(ZooError, match=r"none can be started.*killed.*memory"):
            pool.facts()
    assert len(started) == 4  # two at first, and two more until three had died


def test_bad_images_are_told_or_left_out(folder: Path, coco: Path, tmp_path: Path) -> None:
    shutil.copytree(coco, tmp_path / "coco")
    bad = sorted((tmp_path / "coco/val2017").iterdir())[2]
    bad.write_bytes(bad.read_bytes()[:200])

    def run(skip: bool) -> Verification:
        return vitadapter_zoo.verify(
            folder, tmp_path / "coco", workers=2, threads=1, run=tmp_path / "run",
            skip_bad_images=skip,
        )  # fmt: skip

    with pytest.raises(ImageError, match=bad.name):
        run(skip=False)
    found = run(skip=True)
    assert list(found.skipped) == [int(bad.stem)]
    assert found.evaluated == PICTURES - 1


def test_what_keeps_a_worker_from_loading_reaches_the_caller(
    folder: Path, coco: Path, tmp_path: Path
) -> None:
    annotations, images = coco_paths(coco)
    content = json.loads(annotations.read_text())
    content["categories"][0]["name"] = "background"
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=r"worker process .*only the file has 'background'"):
        vitadapter_zoo.verify(folder, read_dataset(changed, images), workers=2, threads=1)
    with pytest.raises(ZooError, match="cannot be read"):
        vitadapter_zoo.verify(tmp_path, coco, workers=2)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_until(true: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers through /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_command_and_the_run_continues(
    number: signal.Signals, folder: Path, coco: Path, alone: Verification, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "vitadapter_zoo.cli", "verify", str(folder), "--coco"]
    options = [str(coco), "--workers", "2", "--threads", "1", "--run", str(run)]
    process = subprocess.Popen(
        [*command, *options], stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=heed_interrupts,
    )  # fmt: skip
    stored = run / PREDICTIONS
    wait_until(lambda: stored.exists() and b"\n" in stored.read_bytes())
    family = children(process.pid)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: to the workers too
    else:
        process.kill()
    wait_until(lambda: not any(is_alive(pid) for pid in family), 60)
    _, errors = process.communicate(timeout=60)
    assert len(family) >= 2
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "Traceback" not in errors
    before = (run / PREDICTIONS).read_bytes().count(b"\n")
    found = vitadapter_zoo.verify(folder, coco, threads=1, run=run)
    assert found.details["images_before"] >= before - 1 > -1
    check_same(found, alone, run)


def test_a_run_keeps_to_its_number_of_threads(folder: Path, coco: Path, tmp_path: Path) -> None:
    vitadapter_zoo.verify(folder, coco, limit=1, threads=1, run=tmp_path)
    with pytest.raises(ZooError, match="threads: 1 then, 2 now"):
        vitadapter_zoo.verify(folder, coco, limit=1, threads=2, run=tmp_path)


def test_what_makes_no_sense_is_refused(small: MaskRCNN, coco: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        vitadapter_zoo.verify(small, coco, workers=0)
    with pytest.raises(ValueError, match="save_pretrained"):
        vitadapter_zoo.verify(small, coco, ray="auto")
    with pytest.raises(ValueError, match="leave checkpoint, device and dtype out"):
        vitadapter_zoo.verify(small, coco, checkpoint=tmp_path, workers=2)


def test_without_ray_the_remedy_is_told(folder: Path, coco: Path) -> None:
    without = "import sys; sys.modules['ray'] = None; from vitadapter_zoo.cli import main; main()"
    command = [sys.executable, "-c", without, "verify", str(folder), "--coco", str(coco)]
    done = subprocess.run([*command, "--ray", "auto"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'vitadapter-zoo[ray]'" in done.stderr
    assert "Traceback" not in done.stderr
