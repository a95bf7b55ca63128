"""The training loop: ``Training.run``."""

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

LOG_EVERY = 20  # steps between two log entries; each waits for the device


class Step(nn.Module):
    """A module that computes the losses, so that DistributedDataParallel can wrap it."""

    def __init__(self, model: MaskRCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: list[Any], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """``vitadapter_zoo.training.losses`` of the detector."""
        return losses(self.model, inputs, targets)


@dataclass
class Progress:
    """The progress of a run; part of the saved state.

    Attributes:
        step: optimizer steps done.
        seconds: training time, including the parts before a resume.
        best: highest mask AP so far in points; -1 before the first evaluation.
        since_best: evaluations since the best one.
        figures: of the last evaluation.
    """

    step: int = 0
    seconds: float = 0.0
    best: float = -1.0
    since_best: int = 0
    figures: dict[str, float] = field(default_factory=dict)


@dataclass
class Training:
    """A prepared training run; ``training.run.train`` builds it.

    Attributes:
        accelerator: devices, processes, precision, accumulation.
        model: the detector, in training mode, on its device.
        net: ``Step`` of it, as the accelerator wraps it.
        optimizer: as the accelerator wraps it.
        average: moving average of the weights, or None.
        recipe: with the learning rate for this batch size.
        views: of the training images.
        batches: of this process, from the next step on.
        validation: the validation images, or None to skip evaluation.
        directory: of the run.
        settings: the settings that must not change when the run is resumed.
        accumulate: forward passes for each step.
        seed: of the run.
        workers: processes of the data loader.
        eval_every: epochs between evaluations.
        early_stop: end the run after this many evaluations without a better mask AP, or None.
        max_seconds: time limit of the run, or None.
        save_seconds: between two saved states.
        reference_backbone: leave a frozen trunk's weights out of all files, see
            ``save_pretrained``.
        progress: the progress so far.
        reporter: only in the main process, None in the others.
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
    reference_backbone: bool
    progress: Progress
    reporter: Reporter | None

    def __post_init__(self) -> None:
        self.steps = max(1, self.batches.per_epoch * self.recipe.epochs // self.accumulate)
        now = time.monotonic()
        self._began = now - self.progress.seconds
        self._saved = self._logged = now
        self._images = 0
        self._evaluated_at = -1
        self._window, self._norms = Window(), Window()
        self._parameters = [x for x in self.model.parameters() if x.requires_grad]
        # The elapsed share of the time limit, the same in every process.
        self._share = self.progress.seconds / (self.max_seconds or math.inf)

    def run(self) -> None:
        """Train until the last step, the time limit or the early stop."""
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
        """Log, evaluate and save when due; return whether the run is over."""
        step = self.progress.step
        logging = step % LOG_EVERY == 0 or step >= self.steps
        if logging:
            self._log_losses()
        if logging or self.accelerator.num_processes == 1:
            self._share_time()
        if interrupt.asked:  # each process stops on its own, without communication
            self._log_losses()
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
        """Return whether the time limit or the early stop has ended the run."""
        stopped = self.early_stop is not None and self.progress.since_best >= self.early_stop
        return stopped or self._share >= 1

    def _finish(self) -> None:
        self._log_losses()
        if self._evaluated_at != self.progress.step:
            self._evaluate()
        self._save()

    def _epoch(self, step: int) -> int:
        """The number of complete epochs after ``step`` steps."""
        return step * self.accumulate // self.batches.per_epoch

    def _set_learning_rate(self) -> None:
        step = self.progress.step
        progress = max(step / self.steps, self._share)
        lr = self.recipe.lr * self.recipe.lr_factor(step, self.steps, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self._lr = lr

    def _clipped_norm(self) -> Tensor:
        """Clip the gradient; return its norm before clipping, on the device."""
        if self.recipe.clip is not None:
            return nn.utils.clip_grad_norm_(self._parameters, self.recipe.clip)
        return nn.utils.get_total_norm([x.grad for x in self._parameters if x.grad is not None])

    def _log_losses(self) -> None:
        """Log the mean losses since the last entry.

        Raises:
            ZooError: a loss is NaN or infinite.
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
                / max(now - self._logged, 1e-9),
                "seconds": self.progress.seconds,
            }
            if self.accelerator.device.type == "cuda":
                entry["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            self.reporter.progress(entry)
        self._logged, self._images = time.monotonic(), 0

    def _share_time(self) -> None:
        """Update the elapsed share of the time limit by the main process's clock."""
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
        """Evaluate; write the folder ``last``, and ``best`` after an improvement."""
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
            folders = [disk.LAST, *([disk.BEST] if improved else [])]
            for folder in folders:
                disk.write_folder(
                    shown, self.directory / folder, reference_backbone=self.reference_backbone
                )
            if progress.figures:
                where = {"step": progress.step, "epoch": self._epoch(progress.step)}
                self.reporter.evaluated({**where, **progress.figures})
        training_mode(self.model)
        self._logged += time.monotonic() - began  # images per second are those of training

    def _save(self) -> None:
        """Write the state for resuming."""
        if not disk.is_finite(self.model):
            raise ZooError(self._diverged({"a weight": math.nan}))
        self._saved = time.monotonic()
        self.progress.seconds = self._saved - self._began
        if self.reporter is None:
            return
        content = {
            **vars(self.progress),
            "settings": self.settings,
            "model": disk.weights_of(self.model, without_trunk=self.reference_backbone),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.average:
            shares = disk.frozen_trunk(self.model) is not None
            content["average"] = disk.weights_of(self.average.average, without_trunk=shares)
        if self.model.row.network is not None:
            content["network"] = self.model.row.network.record()
        disk.write_state(self.directory, content)


def restore(training: Training, saved: dict[str, Any]) -> None:
    """Load a saved state into a newly prepared run."""
    training.model.load_state_dict(disk.completed(training.model, saved["model"]))
    training.optimizer.load_state_dict(saved["optimizer"])
    if training.average:
        average = training.average.average
        average.load_state_dict(disk.completed(average, saved["average"]))


def training_mode(model: nn.Module) -> None:
    """Set training mode except for frozen parts, whose BatchNorm statistics must not change."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(x.requires_grad for x in parameters):
            module.eval()


def _seed(seed: int, number: int, process: int) -> None:
    """Seed a forward pass by its number, so that a resumed run draws the same random numbers."""
    words = np.random.SeedSequence((seed, number, process)).generate_state(2)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))


@contextlib.contextmanager
def out_of_memory(batch_size: int) -> Iterator[None]:
    """Replace an out-of-memory error by one that names the settings to change.

    Raises:
        ZooError: the device ran out of memory.
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
