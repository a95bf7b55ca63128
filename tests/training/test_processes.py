"""Several processes: the same images as one, and the mean of the processes' gradients."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import shapes
import torch
from forked import heed_interrupts
from safetensors.torch import load_file

from vitadapter_zoo.training import losses
from vitadapter_zoo.training.batches import Batches, Views, collate, inputs_and_targets
from vitadapter_zoo.training.data import read_data
from vitadapter_zoo.training.loop import _seed
from vitadapter_zoo.training.recipe import parameter_groups, published
from vitadapter_zoo.training.start import starting_model
from vitadapter_zoo.training.state import read_log
from vitadapter_zoo.training.transforms import sizes

NANO = "adapter-n-emoji"
EPOCHS, EACH = 4, 2  # images for each process
OPTIONS = [
    *("--from", "scratch", "--input-size", "64", "64", "--lr", "1e-3", "--clip", "5"),
    *("--augment", "none", "--schedule", "cosine", "--eval-every", "1000", "--workers", "0"),
    *("--epochs", str(EPOCHS), "--device", "cpu"),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batches_of_one(processes: int) -> None:
    wide = [number % 3 == 0 for number in range(23)]
    whole = list(Batches(wide, 2 * processes, 3, seed=5))
    shares = [list(Batches(wide, 2, 3, 5, 0, place, processes)) for place in range(processes)]
    joined = [[key for part in parts for key in part] for parts in zip(*shares, strict=True)]
    assert joined == whole


def trained_by_hand(data: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights and losses of a loop in one process that does the work of two."""
    found = read_data(data)
    model, _ = starting_model(NANO, "scratch", found.classes, input_size=(64, 64))
    recipe = replace(
        published(model.row), epochs=EPOCHS, lr=1e-3, clip=5, augment="none", schedule="cosine"
    )
    views = Views(found.train.samples, sizes(recipe.augment, model.row.input_size), 0)
    mean, deviation = (torch.tensor(x)[:, None, None] for x in (model.row.mean, model.row.std))
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe), betas=recipe.betas)
    square = [False] * len(found.train.samples)
    shares = [list(Batches(square, EACH, EPOCHS, 0, 0, process, 2)) for process in range(2)]
    parameters, steps = list(model.parameters()), len(shares[0])
    model.train()
    told = []
    for number in range(steps):
        before = {name: value.clone() for name, value in model.named_buffers()}
        gradients = []
        for process in (1, 0):  # the statistics of process 0 are kept
            for name, value in model.named_buffers():
                value.copy_(before[name])
            optimizer.zero_grad()
            _seed(0, number, process)
            batch = collate([views[key] for key in shares[process][number]])
            assert not isinstance(batch, Exception)
            parts = losses(model, *inputs_and_targets(batch, mean, deviation))
            total = torch.stack(list(parts.values())).sum()
            total.backward()
            gradients.append([x.grad for x in parameters])
        told.append(float(total.detach()))
        for parameter, second, first in zip(parameters, *gradients, strict=True):
            assert first is not None
            assert second is not None
            parameter.grad = (first + second) / 2
        torch.nn.utils.clip_grad_norm_(parameters, 5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * recipe.lr_factor(number, steps) * group["lr_scale"]
        optimizer.step()
    return model.state_dict(), told


@pytest.mark.slow
def test_two_processes_step_by_the_mean_of_their_gradients(tmp_path: Path) -> None:
    """By gloo, against a loop in one process that takes both processes' images in turn."""
    data, out = shapes.coco(tmp_path / "data"), tmp_path / "run"
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, "-m", *launch, "-m", "vitadapter_zoo", "train", NANO]
    done = subprocess.run(
        [*command, "--data", data, "--out", out, *OPTIONS, "--batch-size", str(EACH)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=heed_interrupts,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert f"{EPOCHS} steps of {2 * EACH} images" in done.stderr
    assert done.stdout.count("detect:") == 1  # one of the processes speaks

    wanted, told = trained_by_hand(data)
    found = load_file(out / "last" / "model.safetensors")
    assert found.keys() <= wanted.keys()
    worst = max(float((found[name] - wanted[name]).abs().max()) for name in found)
    assert worst < 1e-6, worst
    # The log has the losses of process 0.
    assert read_log(out)[0]["loss"] == pytest.approx(sum(told) / len(told), rel=1e-5)
