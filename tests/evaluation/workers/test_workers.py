"""Verification by several processes, and what happens when some of them die."""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import scenes
from forked import COMMAND, workers

import vitadapter_zoo
from vitadapter_zoo import DatasetError, ImageError, MaskRCNN, Verification, ZooError
from vitadapter_zoo.evaluation.dataset import Image, coco_paths, read_dataset
from vitadapter_zoo.evaluation.options import Options
from vitadapter_zoo.evaluation.run import PREDICTIONS, ImageResult, Run
from vitadapter_zoo.evaluation.workers.pool import Events, Pool, Spec
from vitadapter_zoo.evaluation.workers.processes import ProcessWorker
from vitadapter_zoo.models import build

PICTURES = 14


@pytest.fixture(scope="module")
def quick(detector: MaskRCNN) -> MaskRCNN:
    """The trained detector on smaller images; tests must not change it."""
    model = build(replace(detector.row, input_size=(160, 128)), detector.categories)
    model.load_state_dict(detector.state_dict())
    return model.eval()


@pytest.fixture(scope="module")
def folder(quick: MaskRCNN, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The detector saved; tests must not change it."""
    return vitadapter_zoo.save_pretrained(quick, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.validation_images(tmp_path_factory.mktemp("coco"), PICTURES)


@pytest.fixture(scope="module")
def alone(folder: Path, coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Verification:
    """What one process finds."""
    found = vitadapter_zoo.verify(folder, coco, threads=1, run=tmp_path_factory.mktemp("run"))
    assert found.box.ap > 0.1
    return found


def check_same(found: Verification, alone: Verification, run: Path) -> None:
    """The digits of one process, each image written once."""
    assert found.results == alone.results
    assert (found.box.figures, found.mask.figures) == (alone.box.figures, alone.mask.figures)
    assert found.details["identity"] == alone.details["identity"]
    assert (run / PREDICTIONS).read_bytes().count(b"\n") == PICTURES


def the_workers() -> list[BaseProcess]:
    return list(multiprocessing.active_children())


def signal_one(number: signal.Signals) -> int:
    """Send a signal to the worker that was started first; its process id."""
    pid = min(pid for worker in the_workers() if (pid := worker.pid) is not None)
    os.kill(pid, number)
    return pid


def test_two_processes_give_the_digits_of_one(
    quick: MaskRCNN, coco: Path, alone: Verification, tmp_path: Path
) -> None:
    counts: list[int] = []

    def count(run: Run, images: Sequence[Image]) -> None:
        counts.append(len(the_workers()))

    found = vitadapter_zoo.verify(quick, coco, workers=2, threads=1, run=tmp_path, watch=count)
    assert max(counts) == found.details["workers"] == 2
    check_same(found, alone, tmp_path)
    assert not the_workers()


def test_a_worker_that_dies_and_one_that_hangs_lose_no_image_and_none_is_counted_twice(
    folder: Path, coco: Path, alone: Verification, tmp_path: Path
) -> None:
    signals = {3: signal.SIGKILL, 6: signal.SIGSTOP}
    sent: list[int] = []

    def disturb(run: Run, images: Sequence[Image]) -> None:
        number = signals.pop(len(run.results), None)
        if number is not None:
            sent.append(signal_one(number))

    found = vitadapter_zoo.verify(folder, coco, workers=2, threads=1, run=tmp_path, watch=disturb)
    assert len(set(sent)) == 2
    check_same(found, alone, tmp_path)
    assert not the_workers()


def spec_for(folder: Path, coco: Path) -> Spec:
    data = read_dataset(*coco_paths(coco))
    return Spec(str(folder), data, Options(threads=1))


def test_an_image_that_ends_three_workers_is_named(folder: Path, coco: Path) -> None:
    images = read_dataset(*coco_paths(coco)).images[:6]
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
    images = read_dataset(*coco_paths(coco)).images[:5]
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


def test_bad_images_are_told_or_left_out(folder: Path, tmp_path: Path) -> None:
    coco = scenes.validation_images(tmp_path / "coco", 5)
    bad = read_dataset(*coco_paths(coco)).images[2]
    bad.path.write_bytes(bad.path.read_bytes()[:200])

    def run(skip: bool) -> Verification:
        return vitadapter_zoo.verify(
            folder, coco, workers=2, threads=1, run=tmp_path / "run", skip_bad_images=skip
        )

    with pytest.raises(ImageError, match=bad.path.name):
        run(skip=False)
    found = run(skip=True)
    assert list(found.skipped) == [bad.image_id]
    assert found.evaluated == 4


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
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers through /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_command_and_the_run_continues(
    number: signal.Signals, folder: Path, coco: Path, alone: Verification, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = ["--coco", str(coco), "--workers", "2", "--threads", "1", "--run", str(run)]
    process = workers().start(COMMAND, "verify", str(folder), *options, session=True)
    stored = run / PREDICTIONS
    # An interrupt takes back the result that is being written, so one more than is needed.
    wait_until(lambda: stored.exists() and stored.read_bytes().count(b"\n") > 1)
    family = children(process.pid)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: to the workers too
    else:
        os.kill(process.pid, number)
    wait_until(lambda: not any(is_alive(pid) for pid in family), 60)
    wait_until(lambda: not process.is_running(), 60)
    done = process.wait()
    assert len(family) >= 2
    if number == signal.SIGINT:
        assert done.returncode == 130
        assert "Traceback" not in done.stderr
    before = (run / PREDICTIONS).read_bytes().count(b"\n")
    found = vitadapter_zoo.verify(folder, coco, threads=1, run=run)
    assert found.details["images_before"] >= before - 1 > -1
    check_same(found, alone, run)


def test_a_run_keeps_to_its_number_of_threads(folder: Path, coco: Path, tmp_path: Path) -> None:
    vitadapter_zoo.verify(folder, coco, limit=1, threads=1, run=tmp_path)
    with pytest.raises(ZooError, match="threads: 1 then, 2 now"):
        vitadapter_zoo.verify(folder, coco, limit=1, threads=2, run=tmp_path)


def test_what_makes_no_sense_is_refused(quick: MaskRCNN, coco: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        vitadapter_zoo.verify(quick, coco, workers=0)
    with pytest.raises(ValueError, match="save_pretrained"):
        vitadapter_zoo.verify(quick, coco, ray="auto")
    with pytest.raises(ValueError, match="leave checkpoint, device and dtype out"):
        vitadapter_zoo.verify(quick, coco, checkpoint=tmp_path, workers=2)


def test_without_ray_the_remedy_is_told(folder: Path, coco: Path) -> None:
    without = f"import sys\nsys.modules['ray'] = None\n{COMMAND}"
    done = workers().run(without, "verify", str(folder), "--coco", str(coco), "--ray", "auto")
    assert done.returncode == 2
    assert "pip install 'vitadapter-zoo[ray]'" in done.stderr
    assert "Traceback" not in done.stderr
