"""The training loop; ``Training.run`` is all of it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.evaluation.dataset import Dataset
from vitadapter_zoo.models import MaskRCNN
from vitadapter_zoo.training import losses
from vitadapter_zoo.training import state as disk
from vitadapter_zoo.training.batches import Batches, Views, data_loader, inputs_and_targets
from vitadapter_zoo.training.evaluate import evaluate
from vitadapter_zoo.training.interrupt import Interrupt
from vitadapter_zoo.training.progress import Reporter, Window
from vitadapter_zoo.training.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

LOOK_EVERY = 20  # steps between two looks at the losses; each look waits for the device


class Step(nn.Module):
    """The losses as a module of its own, so that several processes can share its gradients."""

    def __init__(self, model: MaskRCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: list[Any], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """``vitadapter_zoo.training.losses`` of the detector."""
        return losses(self.model, inputs, targets)


@dataclass
class Progress:
    """How far a run is; all of it is in the saved state.

    Attributes:
        step: optimizer steps done.
        seconds: that the run has taken, over all its parts.
        best: highest mask AP so far in points; -1 before the first evaluation.
        since_best: evaluations since then.
        figures: of the last evaluation.
    """

    step: int = 0
    seconds: float = 0.0
    best: float = -1.0
    since_best: int = 0
    figures: dict[str, float] = field(default_factory=dict)


@dataclass
class Training:
    """Everything that the loop needs, ready; ``prepare`` in ``run`` makes it.

    Attributes:
        accelerator: devices, processes, precision, accumulation.
        model: the detector, in training mode, on its device.
        net: ``Step`` of it, as the accelerator wraps it.
        optimizer: as the accelerator wraps it.
        average: moving average of the weights; None without.
        recipe: with the learning rate of this batch size.
        views: of the training images.
        batches: of this process, from the first step on.
        validation: None where nothing is evaluated.
        directory: of the run.
        settings: what a continued run must have in common with the first part.
        accumulate: forward passes for each step.
        seed: of the run.
        workers: processes of the data loader.
        eval_every: epochs between evaluations.
        early_stop: evaluations without a better mask AP after which the run ends; None: never.
        max_seconds: after which the run ends; None: never.
        save_seconds: between two saved states.
        progress: how far the run is.
        reporter: None in all processes but the main one.
    """

    accelerator: Accelerator
    model: MaskRCNN
    net: nn.Module
    optimizer: Any
    average: disk.Average | None
    recipe: Recipe
    views: Views
    batches: Batches
    validation: Dataset | None
    directory: Path
    settings: dict[str, Any]
    accumulate: int
    seed: int
    workers: int
    eval_every: int
    early_stop: int | None
    max_seconds: float | None
    save_seconds: float
    progress: Progress
    reporter: Reporter | None

    def __post_init__(self) -> None:
        self.steps = max(1, self.batches.per_epoch * self.recipe.epochs // self.accumulate)
        now = time.monotonic()
        self._began = now - self.progress.seconds
        self._saved = self._looked = now
        self._images = 0
        self._evaluated_at = -1
        self._window, self._norms = Window(), Window()
        self._parameters = [x for x in self.model.parameters() if x.requires_grad]
        # Of the time limit that has passed; the same in every process.
        self._share = self.progress.seconds / (self.max_seconds or math.inf)

    def run(self) -> None:
        """Train to the end, to the time limit, or until the mask AP no longer rises."""
        device, row = self.accelerator.device, self.model.row
        mean, deviation = (
            torch.tensor(values, device=device)[:, None, None] for values in (row.mean, row.std)
        )
        loader = data_loader(self.views, self.batches, self.workers, device)
        training_mode(self.model)
        done = self.progress.step * self.accumulate
        with Interrupt() as interrupt:
            for number, batch in enumerate(() if self._is_over() else loader, done):
                if isinstance(batch, ZooError):
                    raise batch
                self._set_learning_rate()
                _seed(self.seed, number, self.accelerator.process_index)
                with self.accelerator.accumulate(self.net):
                    parts = self.net(*inputs_and_targets(batch.to(device), mean, deviation))
                    total = torch.stack(list(parts.values())).sum()
                    self.accelerator.backward(total)
                    whole = self.accelerator.sync_gradients
                    if whole:
                        self._norms.add({"gradient_norm": self._clipped_norm()})
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                self._window.add({**parts, "loss": total})
                self._images += len(batch.counts)
                if whole:
                    self.progress.step += 1
                    if self.average:
                        self.average.update(self.progress.step)
                    if self._after_step(interrupt):
                        break
        self._finish()

    def _after_step(self, interrupt: Interrupt) -> bool:
        """Look, evaluate and save when it is time; whether the run is over."""
        step = self.progress.step
        looking = step % LOOK_EVERY == 0 or step >= self.steps
        if looking:
            self._look()
        if looking or self.accelerator.num_processes == 1:
            self._share_time()
        if interrupt.asked:  # of several processes each on its own, so nothing is exchanged
            self._look()
            self._save()
            raise KeyboardInterrupt
        if step >= self.steps or self._is_over():
            return True
        if self._epoch(step) > self._epoch(step - 1) and self._epoch(step) % self.eval_every == 0:
            self._evaluate()
            self._save()
            return self._is_over()
        if time.monotonic() - self._saved > self.save_seconds:
            self._save()
        return False

    def _is_over(self) -> bool:
        """Whether the time limit or the early stop ends the run before its last step."""
        stopped = self.early_stop is not None and self.progress.since_best >= self.early_stop
        return stopped or self._share >= 1

    def _finish(self) -> None:
        self._look()
        if self._evaluated_at != self.progress.step:
            self._evaluate()
        self._save()

    def _epoch(self, step: int) -> int:
        """Whole epochs after so many steps."""
        return step * self.accumulate // self.batches.per_epoch

    def _set_learning_rate(self) -> None:
        step = self.progress.step
        progress = max(step / self.steps, self._share)
        lr = self.recipe.lr * self.recipe.lr_factor(step, self.steps, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self._lr = lr

    def _clipped_norm(self) -> Tensor:
        """The gradient's norm before clipping; it stays on the device."""
        if self.recipe.clip is not None:
            return nn.utils.clip_grad_norm_(self._parameters, self.recipe.clip)
        return nn.utils.get_total_norm([x.grad for x in self._parameters if x.grad is not None])

    def _look(self) -> None:
        """Fetch and log the losses since the last look.

        Raises:
            ZooError: they are no longer numbers.
        """
        now = time.monotonic()
        self.progress.seconds = now - self._began
        figures = {**self._window.means(), **self._norms.means()}
        if not all(math.isfinite(value) for value in figures.values()):
            raise ZooError(self._diverged(figures))
        if self.reporter is not None and figures:
            entry: dict[str, Any] = {
                "step": self.progress.step,
                "epoch": self._epoch(self.progress.step),
                "lr": self._lr,
                **figures,
                "images_per_second": self._images
                * self.accelerator.num_processes
                / max(now - self._looked, 1e-9),
                "seconds": self.progress.seconds,
            }
            if self.accelerator.device.type == "cuda":
                entry["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            self.reporter.progress(entry)
        self._looked, self._images = time.monotonic(), 0

    def _share_time(self) -> None:
        """How much of the time limit has passed, by the main process's clock."""
        if self.max_seconds is None:
            return
        self.progress.seconds = time.monotonic() - self._began
        shares = [self.progress.seconds / self.max_seconds]
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(shares)
        self._share = shares[0]

    def _diverged(self, figures: dict[str, float]) -> str:
        names = [name for name, value in figures.items() if not math.isfinite(value)]
        saved = disk.read_state(self.directory)
        kept = f"the state of step {saved['step']} is kept" if saved else "no state is saved yet"
        return (
            f"training diverged before step {self.progress.step} ({', '.join(names)} is not a "
            f"number); {kept} in {self.directory}: begin again with a lower --lr, or with --clip 1"
        )

    def _evaluate(self) -> None:
        """Evaluate, and write the folders ``last`` and, if it is the best, ``best``."""
        began = time.monotonic()
        if not disk.is_finite(self.model):
            raise ZooError(self._diverged({"a weight": math.nan}))
        shown = self.average.average if self.average else self.model.eval()
        progress = self.progress
        improved = True
        if self.validation is not None:
            progress.figures = evaluate(shown, self.validation, self.accelerator)
            improved = progress.figures["mask_ap"] > progress.best
            progress.since_best = 0 if improved else progress.since_best + 1
            progress.best = max(progress.best, progress.figures["mask_ap"])
        self._evaluated_at = progress.step
        if self.reporter is not None:
            disk.write_folder(shown, self.directory / disk.LAST)
            if improved:
                disk.write_folder(shown, self.directory / disk.BEST)
            if progress.figures:
                where = {"step": progress.step, "epoch": self._epoch(progress.step)}
                self.reporter.evaluated({**where, **progress.figures})
        training_mode(self.model)
        self._looked += time.monotonic() - began  # images per second are those of training

    def _save(self) -> None:
        """Write the state that a continued run begins with."""
        if not disk.is_finite(self.model):
            raise ZooError(self._diverged({"a weight": math.nan}))
        self._saved = time.monotonic()
        self.progress.seconds = self._saved - self._began
        if self.reporter is None:
            return
        content = {
            **vars(self.progress),
            "settings": self.settings,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.average:
            content["average"] = self.average.average.state_dict()
        disk.write_state(self.directory, content)


def restore(training: Training, saved: dict[str, Any]) -> None:
    """Put a saved state into a run that has just been prepared."""
    training.model.load_state_dict(saved["model"])
    training.optimizer.load_state_dict(saved["optimizer"])
    if training.average:
        training.average.average.load_state_dict(saved["average"])


def training_mode(model: nn.Module) -> None:
    """Training mode, except for frozen parts: their BatchNorms keep their statistics."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(x.requires_grad for x in parameters):
            module.eval()


def _seed(seed: int, number: int, process: int) -> None:
    """Make all random draws of a forward pass a function of its number.

    A continued run then draws the same, whatever has drawn in between.
    """
    words = np.random.SeedSequence((seed, number, process)).generate_state(2)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))


@contextlib.contextmanager
def out_of_memory(batch_size: int) -> Iterator[None]:
    """Turn a full device into an error that names what to change.

    Raises:
        ZooError: the device has no memory left.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        smaller = (
            f"--batch-size {max(1, batch_size // 2)} --accumulate 2, " if batch_size > 1 else ""
        )
        raise ZooError(
            f"the device has too little memory for {batch_size} images at a time: use {smaller}"
            "--checkpoint-blocks, --precision bf16, or a smaller --input-size"
        ) from error
