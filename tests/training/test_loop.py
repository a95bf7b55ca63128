"""Training runs: a nano network learns a handful of images, and a run can be continued."""

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import shapes
import torch
from forked import failure, run
from quick_training import NANO, OPTIONS, QUICK, same, weights

import vitadapter_zoo
from vitadapter_zoo import DatasetError, ZooError, load
from vitadapter_zoo.evaluation.dataset import read_dataset
from vitadapter_zoo.training.run import TrainingResult, train
from vitadapter_zoo.training.state import read_log, read_state

pytestmark = pytest.mark.usefixtures("one_thread")


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
    verify = shlex.split(done.stdout.splitlines()[-1].partition("vitadapter-zoo ")[2])
    judged = run(*verify, "--run", str(tmp_path / "verified"))
    assert judged.returncode == 3, judged.stderr
    assert "no published values belong to this data" in judged.stdout
    assert load(out / "best").categories == shapes.CLASSES


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
    with pytest.raises(DatasetError, match="1 is missing"):
        train(NANO, root, tmp_path / "run", epochs=1, **QUICK)
    message = failure("train", NANO, "--data", str(root), "--out", str(tmp_path / "cli"), *OPTIONS)
    assert "1 is missing" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cli").exists()


def test_frozen_parts_stay_as_they_are(trained: TrainingResult, data: Path, tmp_path: Path) -> None:
    options = {**QUICK, "start": trained.last, "epochs": 1, "freeze": ["backbone"]}
    result = train(NANO, data, tmp_path / "run", **options)
    before, after = weights(trained.last), weights(result.last)
    changed = {name.partition(".")[0] for name in before if not before[name].equal(after[name])}
    assert changed == {"neck", "rpn_head", "roi_head"}
    with pytest.raises(ZooError, match="no parameter's name begins with 'backbon_'"):
        train(NANO, data, tmp_path / "other", **{**options, "freeze": ["backbon_"]})


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


def test_a_run_ends_early_and_stays_ended(data: Path, tmp_path: Path) -> None:
    options = {**QUICK, "lr": 1e-9, "eval_every": 1, "early_stop": 2, "epochs": 30}
    first = train(NANO, data, tmp_path / "run", **options)
    assert first.step == 2 * 3  # the first evaluation is the best, two more are not better
    again = train(NANO, data, tmp_path / "run", resume=True, **options)
    assert again.step == first.step
    assert same(first.last, again.last)
