"""Training runs: a nano network learns a handful of images, and a run can be continued."""

import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import shapes
import torch
from forked import COMMAND, failure, heed_interrupts, run, workers
from safetensors.torch import load_file

import vitadapter_zoo
from vitadapter_zoo import DatasetError, ZooError, get_row, load
from vitadapter_zoo.evaluation.dataset import read_dataset
from vitadapter_zoo.models import MaskRCNN, build
from vitadapter_zoo.training.loop import out_of_memory
from vitadapter_zoo.training.memory import checkpoint_blocks
from vitadapter_zoo.training.run import TrainingResult, train
from vitadapter_zoo.training.start import carry_over, initialize
from vitadapter_zoo.training.state import read_log, read_state

NANO = "adapter-n-emoji"
QUICK: dict[str, Any] = {
    "start": "scratch",
    "input_size": (64, 64),
    "batch_size": 2,
    "lr": 1e-3,
    "clip": 5,
    "augment": "none",
    "schedule": "cosine",
    "eval_every": 1000,
    "workers": 0,
    "device": "cpu",
    "progress": False,
}
OPTIONS = [
    *("--from", "scratch", "--input-size", "64", "64", "--batch-size", "2", "--lr", "1e-3"),
    *("--clip", "5", "--augment", "none", "--schedule", "cosine", "--eval-every", "1000"),
    *("--workers", "0", "--device", "cpu"),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The same arithmetic in every run, and no waiting for threads on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.coco(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """From nothing to having learnt four images by heart."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return train(NANO, data, out, epochs=40, ema=0.9, tensorboard=True, **QUICK)


AMBIENT: dict[str, Callable[[], object]] = {
    "float16": lambda: torch.set_default_dtype(torch.float16),
    "meta": lambda: torch.set_default_device("meta"),
    "no grad": lambda: torch.set_grad_enabled(False),
    "coarse products": lambda: torch.set_float32_matmul_precision("medium"),
}


@pytest.fixture(scope="module")
def plainly_trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    return train(NANO, data, tmp_path_factory.mktemp("plain") / "run", epochs=1, **QUICK)


@pytest.mark.parametrize("name", AMBIENT)
def test_no_state_of_the_process_changes_a_weight(
    name: str, data: Path, tmp_path: Path, plainly_trained: TrainingResult
) -> None:
    """Another library's default dtype, default device, grad mode or precision of products."""
    try:
        AMBIENT[name]()
        found = train(NANO, data, tmp_path / "run", epochs=1, **QUICK)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        torch.set_grad_enabled(True)
        torch.set_float32_matmul_precision("highest")
    assert same(found.last, plainly_trained.last)


def test_the_run_never_replaces_its_own_annotations(data: Path, tmp_path: Path) -> None:
    annotations = data / "annotations" / "instances_val2017.json"
    own = tmp_path / "valid.json"
    own.write_bytes(annotations.read_bytes())
    files = ((data / "annotations" / "instances_train2017.json", data / "train2017"),
             (own, data / "val2017"))  # fmt: skip
    with pytest.raises(ZooError, match="which is never replaced"):
        train(NANO, None, tmp_path, train_files=files[0], valid_files=files[1], epochs=1, **QUICK)
    assert own.read_bytes() == annotations.read_bytes()


@pytest.mark.parametrize("line", [b'{"step": "1"}', b"[]", b"\xff", b"[" * 100_000, b"torn"])
def test_a_log_is_read_up_to_a_line_that_is_none_of_ours(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    assert read_log(tmp_path) == [{"step": 1}]


def test_a_state_that_is_another_pickle_is_one_error(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "state.pt")
    with pytest.raises(ZooError, match=r"state.pt cannot be read \("):
        read_state(tmp_path)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_four_images_are_learnt(trained: TrainingResult, data: Path) -> None:
    assert trained.figures["box_ap"] > 80
    assert trained.figures["mask_ap"] > 80
    assert trained.classes == shapes.CLASSES
    model = load(trained.best)
    assert model.categories == shapes.CLASSES
    assert model.row.input_size == (64, 64)
    found = model.predict(data / "train2017" / "000.png", score_threshold=0.5)[0]
    assert sorted(found.class_names[:2]) == sorted(
        shapes.CLASSES[kind] for kind, _ in shapes.draw(trained.directory / "again.png", 0)
    )


def test_the_verifier_gives_the_same_figures(trained: TrainingResult, data: Path) -> None:
    dataset = read_dataset(trained.directory / "valid.json", data / "val2017")
    verification = vitadapter_zoo.verify(load(trained.last), dataset, progress=False)
    assert 100 * verification.box.ap == pytest.approx(trained.figures["box_ap"])
    assert 100 * verification.mask.ap == pytest.approx(trained.figures["mask_ap"])


def test_what_a_run_leaves(trained: TrainingResult) -> None:
    names = {path.name for path in trained.directory.iterdir() if path.name[0] != "."}
    assert names >= {"last", "best", "log.jsonl", "state.pt", "valid.json", "tensorboard"}
    log = read_log(trained.directory)
    assert [entry["step"] for entry in log] == [20, 40, 60, 80, 80]
    assert log[-1]["mask_ap"] == trained.figures["mask_ap"]
    parts = {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"}
    assert parts | {"lr", "gradient_norm", "images_per_second"} <= log[0].keys()
    assert log[3]["loss"] < log[0]["loss"] / 4
    assert log[3]["loss"] == pytest.approx(sum(log[3][name] for name in parts), rel=1e-5)
    assert list((trained.directory / "tensorboard").iterdir())


@pytest.mark.parametrize("layout", [shapes.roboflow, shapes.yolo])
def test_the_command_trains_from_a_folder(
    layout: Any, trained: TrainingResult, tmp_path: Path
) -> None:
    """From the weights of the run above, so that a few steps are enough."""
    root, out = layout(tmp_path / "data"), tmp_path / "run"
    options = [*OPTIONS, "--from", str(trained.best), "--lr", "2e-4", "--epochs", "4"]
    done = run("train", NANO, "--data", str(root), "--out", str(out), *options)
    assert done.returncode == 0, done.stderr
    assert "heads kept for circle, square" in done.stderr
    assert "train: 4 images, 8 objects" in done.stderr
    assert read_log(out)[-1]["mask_ap"] > 80
    assert f"vitadapter-zoo predict IMAGE --model {out / 'best'}" in done.stdout
    assert load(out / "best").categories == shapes.CLASSES


def interrupt_when_saved(out: Path, saves: int, number: int = signal.SIGINT) -> threading.Thread:
    """Signal this process when a run has saved its state so many times."""

    def watch() -> None:
        seen: set[int] = set()
        while len(seen) < saves:
            try:
                seen.add((out / "state.pt").stat().st_mtime_ns)
            except OSError:
                time.sleep(0.001)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_three_parts_give_the_weights_of_one(data: Path, tmp_path: Path) -> None:
    """With everything that has a state: average, accumulation, augmentation, stochastic draws."""
    options = {**QUICK, "epochs": 8, "ema": 0.9, "accumulate": 2, "augment": "multi-scale"}
    whole = train(NANO, data, tmp_path / "whole", **options)
    assert whole.step == 8
    out = tmp_path / "parts"
    options["save_minutes"] = 1e-6  # after every step
    steps = []
    for number in (signal.SIGINT, signal.SIGTERM):
        thread = interrupt_when_saved(out, 2, number)
        with pytest.raises(KeyboardInterrupt):
            train(NANO, data, out, resume=True, **options)
        thread.join()
        state = read_state(out)
        assert state
        steps.append(state["step"])
    assert 0 < steps[0] < steps[1] < 8
    result = train(NANO, data, out, resume=True, **options)
    assert result.step == 8
    assert same(whole.last, result.last)
    logged = [entry["step"] for entry in read_log(out)]
    assert logged == sorted(logged)
    assert logged[-1] == 8


def test_ctrl_c_reaches_all_processes(data: Path, tmp_path: Path) -> None:
    """As a terminal sends it: to those that prepare images too."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "vitadapter_zoo", "train", NANO]
    process = subprocess.Popen(
        [*command, "--data", data, "--out", out, *OPTIONS, "--epochs", "500", "--workers", "2"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )
    while not (out / "log.jsonl").exists() and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert told.endswith("interrupted\n")
    assert "Traceback" not in told
    state = read_state(out)
    assert state
    assert state["step"] >= 20


def test_a_file_that_vanishes_ends_the_run_with_its_name(tmp_path: Path) -> None:
    root, out = shapes.roboflow(tmp_path / "data"), tmp_path / "run"
    options = ["--epochs", "500", "--workers", "1", "--lr", "1e-4"]
    worker = workers().start(
        COMMAND, "train", NANO, "--data", str(root), "--out", str(out), *OPTIONS, *options,
        environment={"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while not (out / "log.jsonl").exists():
        time.sleep(0.1)
    (root / "train" / "001.png").unlink()
    done = worker.wait()
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert "cannot read the image" in last
    assert "001.png" in last
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_twenty_kills_change_nothing(data: Path, tmp_path: Path) -> None:
    options = [*OPTIONS, "--epochs", "30", "--ema", "0.9", "--eval-every", "3"]
    environment = {"OMP_NUM_THREADS": "1"}
    arguments = ("train", NANO, "--data", str(data), *options, "--out")
    whole = workers().run(COMMAND, *arguments, str(tmp_path / "whole"), environment=environment)
    assert whole.returncode == 0, whole.stderr
    generator, kills, parts = random.Random(0), 0, 0
    while kills < 20:
        parts += 1
        out, status = tmp_path / f"parts-{parts}", 1
        while status:
            worker = workers().start(
                COMMAND, *arguments, str(out), "--resume", environment=environment
            )
            if kills < 20:
                time.sleep(generator.uniform(1, 8))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)
            done = worker.wait()
            status = done.returncode
            assert status in (0, -signal.SIGKILL), done.stderr
            kills += status != 0
            for name in ("last", "best"):  # whole or absent, whatever moment it was
                if (out / name).exists():
                    load(out / name)
        assert same(tmp_path / "whole" / "last", out / "last")
        assert same(tmp_path / "whole" / "best", out / "best")


def test_another_run_is_not_continued(trained: TrainingResult, data: Path) -> None:
    with pytest.raises(ZooError, match=r"holds a run already .*--resume"):
        train(NANO, data, trained.directory, **QUICK)
    with pytest.raises(ZooError, match=r"was begun with lr = 0\.001, not 0\.5"):
        train(
            NANO, data, trained.directory, resume=True, epochs=40, ema=0.9, **{**QUICK, "lr": 0.5}
        )


def test_a_run_that_diverges_stops(data: Path, tmp_path: Path) -> None:
    options = {**QUICK, "lr": 1e12, "clip": None, "epochs": 60}
    with pytest.raises(ZooError, match=r"training diverged before step \d+ .*lower --lr"):
        train(NANO, data, tmp_path / "run", **options)
    assert not (tmp_path / "run" / "last").exists()
    assert not (tmp_path / "run" / "state.pt").exists()


def test_bad_data_are_told_before_the_first_step(tmp_path: Path) -> None:
    root = shapes.roboflow(tmp_path / "data")
    (root / "train" / "000.png").unlink()
    with pytest.raises(DatasetError, match="1 are not there"):
        train(NANO, root, tmp_path / "run", epochs=1, **QUICK)
    message = failure("train", NANO, "--data", str(root), "--out", str(tmp_path / "cli"), *OPTIONS)
    assert "1 are not there" in message
    assert message.count("\n") == 1


def test_frozen_parts_stay_as_they_are(trained: TrainingResult, data: Path, tmp_path: Path) -> None:
    options = {**QUICK, "start": trained.last, "epochs": 1, "freeze": ["backbone"]}
    result = train(NANO, data, tmp_path / "run", **options)
    before, after = weights(trained.last), weights(result.last)
    changed = {name.partition(".")[0] for name in before if not before[name].equal(after[name])}
    assert changed == {"neck", "rpn_head", "roi_head"}
    with pytest.raises(ZooError, match="no parameter's name begins with 'backbon_'"):
        train(NANO, data, tmp_path / "other", **{**options, "freeze": ["backbon_"]})


def test_heads_follow_the_names_of_the_classes() -> None:
    row = get_row(NANO)
    old, new = build(row, ("cat", "dog", "horse")), build(row, ("emu", "horse", "cat"))
    initialize(old, 1)
    initialize(new, 2)
    assert carry_over(old, new, "old") == (
        "weights of old; heads kept for horse, cat; fresh heads for emu"
    )
    drawn = new.state_dict()["roi_head.bbox_head.fc_cls.weight"][0]
    assert float(drawn.std()) == pytest.approx(0.01, rel=0.3)
    heads = "roi_head.bbox_head.fc_cls.weight", "roi_head.mask_head.conv_logits.bias"
    for name in heads:
        a, b = old.state_dict()[name], new.state_dict()[name]
        assert torch.equal(b[1], a[2])
        assert torch.equal(b[2], a[0])
    name = "roi_head.bbox_head.fc_reg.weight"
    assert torch.equal(new.state_dict()[name][4:8], old.state_dict()[name][8:12])
    name = "roi_head.bbox_head.fc_cls.bias"
    assert torch.equal(new.state_dict()[name][-1], old.state_dict()[name][-1])
    name = "backbone.spm.fc1.weight"
    assert torch.equal(new.state_dict()[name], old.state_dict()[name])
    other = build(get_row("adapter-t-deit-3x"))
    with pytest.raises(vitadapter_zoo.CheckpointError, match="another network than adapter-n"):
        carry_over(other, new, "adapter-t-deit-3x")


def gradients(model: MaskRCNN) -> list[torch.Tensor]:
    torch.manual_seed(0)
    maps = model.backbone(torch.randn(1, 3, 64, 64))
    sum(x.square().mean() for x in maps).backward()
    return [x.grad.clone() for x in model.backbone.parameters() if x.grad is not None]


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    model = build(get_row(NANO))
    initialize(model)
    model.train()
    kept = gradients(model)
    model.zero_grad()
    names = list(model.state_dict())
    assert checkpoint_blocks(model.backbone) == 8 + 4 + 6  # blocks, injectors, extractors
    assert list(model.state_dict()) == names
    again = gradients(model)
    assert len(kept) == len(again) > 200
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_wrong_arguments(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be above 0, got 0"):
        train(NANO, data, tmp_path / "run", **{**QUICK, "batch_size": 0})
    with pytest.raises(ValueError, match="ema is a decay between 0 and 1"):
        train(NANO, data, tmp_path / "run", ema=2.0, **QUICK)
    nan = float("nan")
    for wrong in ({"lr": nan}, {"clip": math.inf}, {"weight_decay": -1.0}, {"weight_decay": nan},
                  {"layer_decay": nan}, {"layer_decay": 5.0}, {"seed": 2**64},
                  {"workers": 10**9}):  # fmt: skip
        name = next(iter(wrong))
        with pytest.raises(ValueError, match=f"{name} must "):
            train(NANO, data, tmp_path / "run", **{**QUICK, **wrong})
    assert not (tmp_path / "run").exists()
    assert "give --data DIR" in failure("train", NANO, "--out", str(tmp_path / "run"))


def test_the_time_limit_ends_a_run(data: Path, tmp_path: Path) -> None:
    result = train(NANO, data, tmp_path / "run", epochs=5000, max_minutes=0.05, **QUICK)
    assert 0 < result.step <= 40
    log = read_log(tmp_path / "run")
    assert log[-1]["step"] == result.step
    assert json.loads((result.last / "config.json").read_text())["id2label"]["1"] == "square"


def test_checkpointed_blocks_keep_less(tmp_path: Path) -> None:
    """Bytes that autograd saves for the backward pass."""

    def saved(model: MaskRCNN) -> int:
        kept: dict[int, int] = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            maps = model.backbone(torch.randn(1, 3, 128, 128))
        assert maps[0].requires_grad
        parameters = {x.untyped_storage().data_ptr() for x in model.parameters()}
        return sum(size for place, size in kept.items() if place not in parameters)

    model = build(get_row(NANO)).train()
    before = saved(model)
    checkpoint_blocks(model.backbone)
    assert saved(model) < 0.4 * before


def test_a_full_device_names_what_to_change() -> None:
    with pytest.raises(
        ZooError, match=r"for 4 images at a time: use --batch-size 2 --accumulate 2"
    ):
        with out_of_memory(4):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    with pytest.raises(ZooError, match=r"for 1 images at a time: use --checkpoint-blocks"):
        with out_of_memory(1):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


def test_a_run_ends_early_and_stays_ended(data: Path, tmp_path: Path) -> None:
    options = {**QUICK, "lr": 1e-9, "eval_every": 1, "early_stop": 2, "epochs": 30}
    first = train(NANO, data, tmp_path / "run", **options)
    assert first.step == 2 * 3  # the first evaluation is the best, two more are not better
    again = train(NANO, data, tmp_path / "run", resume=True, **options)
    assert again.step == first.step
    assert same(first.last, again.last)
