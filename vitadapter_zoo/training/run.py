"""``train``: from a name and a data set's folder to a fine-tuned detector."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vitadapter_zoo.detections.output_files import refuse_inputs
from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.evaluation.dataset import Dataset, read_dataset
from vitadapter_zoo.models import MaskRCNN
from vitadapter_zoo.models.precision import usual_state
from vitadapter_zoo.settings import LARGEST_SEED, MOST_PROCESSES, expanded
from vitadapter_zoo.text import shown
from vitadapter_zoo.timm_detector import TimmDetector
from vitadapter_zoo.training import state as disk
from vitadapter_zoo.training.backbone import (
    Asked,
    asked_for,
    check_reference,
    resume_network,
    starting_around,
)
from vitadapter_zoo.training.batches import Batches, Views
from vitadapter_zoo.training.data import Source, TrainingData, described, read_data, write_coco
from vitadapter_zoo.training.loop import Progress, Training, out_of_memory, restore
from vitadapter_zoo.training.progress import Reporter
from vitadapter_zoo.training.recipe import (
    Augment,
    Recipe,
    Schedule,
    published,
)
from vitadapter_zoo.training.setup import (
    accelerator_of,
    freeze_parameters,
    loader_workers,
    prepared,
)
from vitadapter_zoo.training.start import PUBLISHED, SCRATCH, starting_model
from vitadapter_zoo.training.transforms import sizes
from vitadapter_zoo.weights import atomic, cache

if TYPE_CHECKING:
    from accelerate import Accelerator

SAVE_SECONDS = 600.0
# Settings that states of earlier versions do not have.
UNASKED = {"reference_backbone": False}


@dataclass(frozen=True)
class TrainingResult:
    """What a run ended with.

    Attributes:
        directory: of the run.
        last: folder of the last detector, for ``load``.
        best: folder of the detector with the highest mask AP.
        step: optimizer steps done.
        classes: names, in the order of the labels.
        figures: of the last evaluation: ``box_ap``, ``box_ap50``, ``mask_ap``, ``mask_ap50`` in
            points, 0..100; empty without validation images.
        best_mask_ap: in points; -1 without validation images.
        is_main_process: whether this is the process, of several, that wrote the files.
        valid_images: folder of the validation images, for ``verify`` with the run's
            ``valid.json``; None without validation images.
    """

    directory: Path
    last: Path
    best: Path
    step: int
    classes: tuple[str, ...]
    figures: dict[str, float]
    best_mask_ap: float
    is_main_process: bool
    valid_images: Path | None


def train(
    name: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] = "run",
    *,
    backbone: str | TimmDetector | None = None,
    adapter: Literal["paper", "dinov3"] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    freeze_backbone: bool | None = None,
    reference_backbone: bool = False,
    train_files: Source | None = None,
    valid_files: Source | None = None,
    start: str | os.PathLike[str] = PUBLISHED,
    resume: bool = False,
    epochs: int | None = None,
    batch_size: int = 2,
    accumulate: int = 1,
    lr: float | None = None,
    schedule: Schedule | None = None,
    weight_decay: float | None = None,
    layer_decay: float | None = None,
    clip: float | None = None,
    augment: Augment | None = None,
    ema: float | None = None,
    input_size: tuple[int, int] | None = None,
    keep_empty: bool = False,
    freeze: Sequence[str] = (),
    checkpoint_blocks: bool = False,
    early_stop: int | None = None,
    eval_every: int = 1,
    max_minutes: float | None = None,
    save_minutes: float = SAVE_SECONDS / 60,
    precision: Literal["no", "bf16"] = "no",
    device: str | None = None,
    workers: int | None = None,
    tensorboard: bool = False,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool | None = None,
    progress: bool = True,
) -> TrainingResult:
    """Train a detector on your own data; the defaults are the row's published recipe.

    Args:
        name: load name, or a folder or repository as for ``load``: the network to train. None
            with a ``backbone``.
        data: the data set's folder, see ``vitadapter_zoo.training.data.read_data``.
        out: the run's folder: ``last`` and ``best`` (for ``load``), ``log.jsonl``, ``state.pt``.
        backbone: instead of ``name``, a vision transformer of timm, with or without ``timm/`` and a
            tag: a new Mask R-CNN around it. A ``TimmDetector`` says more of the network.
        adapter: around ``backbone``: ``"paper"`` (the default) or ``"dinov3"``.
        checkpoint: file or URL of the weights of ``backbone``, timm's or the authors'; by default
            timm's are downloaded, or taken from huggingface_hub's cache.
        freeze_backbone: the trunk keeps its weights and has no gradients. By default DINOv3's
            adapter freezes it and the paper's does not. DINOv3's adapter only reads the trunk,
            which then keeps no activations; the paper's sends gradients through the trunk's blocks
            to its injectors, which saves the optimizer's memory only.
        reference_backbone: leave a frozen trunk's weights out of the run's files, which then refer
            to them by name and sha256; ``load`` reads them from where they came.
        train_files: instead of ``data``, (annotation file, folder of images).
        valid_files: the same for evaluation.
        start: ``"published"``, ``"pretraining"``, ``"scratch"``, or another load name, folder or
            checkpoint file. For a ``backbone`` the first two are the trunk's pretrained weights.
        resume: continue the run in ``out``, to the same weights as in one piece; begin it where
            there is none.
        epochs: passes over the training images; published: 12 or 36.
        batch_size: images for each process and forward pass; published: 2 on each of 8 GPUs.
        accumulate: forward passes for each step of the optimizer.
        lr: learning rate; by default the published one, scaled linearly from 16 images a step.
        schedule: ``"step"`` as published, or ``"cosine"``.
        weight_decay: published: 0.05 (3x) or 0.01 (1x).
        layer_decay: published: 0.8 (AugReg-L, DINOv2-L), 0.7 (DINOv2-S, DINOv2-B), 0.65
            (Uni-Perceiver-B), none for the others.
        clip: largest norm of the gradient; published: none.
        augment: ``"multi-scale"`` with crops (published for 3x), ``"flip"`` (1x) or ``"none"``.
        ema: decay of a moving average of the weights, 0.999 for instance; it is what is
            evaluated and written. Published: none.
        input_size: (longest, shortest) side of the resized images; the row's own by default.
        keep_empty: train on images without objects too; published: left out.
        freeze: prefixes of parameter names that keep their values, ``"backbone"`` for instance.
        checkpoint_blocks: compute the activations of the blocks twice instead of keeping them.
        early_stop: end after so many evaluations without a better mask AP.
        eval_every: epochs between evaluations.
        max_minutes: end after that time; the schedule is then compressed to end with it.
        save_minutes: between two saved states, beside those at every evaluation.
        precision: ``"bf16"`` computes in bfloat16 where that is safe.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; by default the best that is there.
        workers: processes that prepare images; by default one for each core but the last.
        tensorboard: write TensorBoard files.
        seed: of all that is random.
        cache_dir: as for ``load``.
        offline: as for ``load``.
        progress: False shows nothing on the terminal.

    Raises:
        DatasetError: the data cannot be trained on.
        ConfigError: neither or both of ``name`` and ``backbone``, or arguments that exclude each
            other.
        ZooError: the run's folder holds another run, the run diverged, the device is too small,
            accelerate is missing; and what ``load`` raises.
        ValueError: an argument outside its range.
    """
    _check_positive(
        epochs=epochs, batch_size=batch_size, accumulate=accumulate, eval_every=eval_every,
        early_stop=early_stop, max_minutes=max_minutes, lr=lr, clip=clip, save_minutes=save_minutes,
    )  # fmt: skip
    if ema is not None and not 0 < ema < 1:
        raise ValueError(f"ema is a decay between 0 and 1, 0.999 for instance, not {ema}")
    asked = asked_for(
        name, backbone, adapter=adapter, checkpoint=checkpoint, freeze=freeze_backbone, start=start
    )
    _check_ranges(
        layer_decay=(layer_decay, 0, 1), weight_decay=(weight_decay, 0, math.inf),
        workers=(workers, 0, MOST_PROCESSES), seed=(seed, 0, LARGEST_SEED),
    )  # fmt: skip
    began = time.monotonic()
    accelerator = accelerator_of(precision, device, accumulate)
    images = batch_size * accumulate * accelerator.num_processes
    with usual_state(), _own_directory(out, accelerator) as directory, out_of_memory(batch_size):
        saved = _saved(directory, resume)
        found = read_data(data, train=train_files, valid=valid_files, keep_empty=keep_empty)
        model, origin = _beginning(
            name, asked, start, saved, found.classes, reference_backbone, input_size=input_size,
            seed=seed, cache_dir=cache_dir, offline=offline, progress=progress,
        )  # fmt: skip
        recipe = _recipe(
            published(model.row).scaled(images), epochs=epochs, schedule=schedule, lr=lr, ema=ema,
            weight_decay=weight_decay, layer_decay=layer_decay, clip=clip, augment=augment,
        )  # fmt: skip
        settings = _settings(
            model, found, recipe, start=os.fspath(start), batch_size=batch_size, seed=seed,
            accumulate=accumulate, processes=accelerator.num_processes, freeze=list(freeze),
            precision=precision, reference_backbone=reference_backbone,
            network=asked.record() if asked else None,
        )  # fmt: skip
        done = _progress(saved, settings, directory)
        done.seconds += time.monotonic() - began
        freeze_parameters(model, freeze)
        net, optimizer, average = prepared(accelerator, model, recipe, checkpoint_blocks)
        training = Training(
            accelerator=accelerator, model=model, net=net, optimizer=optimizer, average=average,
            recipe=recipe, directory=directory, settings=settings, accumulate=accumulate,
            seed=seed, workers=loader_workers(workers, accelerator), eval_every=eval_every,
            early_stop=early_stop, save_seconds=60 * save_minutes, progress=done, reporter=None,
            reference_backbone=reference_backbone,
            max_seconds=None if max_minutes is None else 60 * max_minutes,
            views=Views(found.train.samples, sizes(recipe.augment, model.row.input_size), seed),
            batches=Batches(
                [_is_wide(sample.size) for sample in found.train.samples], batch_size,
                recipe.epochs, seed, done.step * accumulate, accelerator.process_index,
                accelerator.num_processes,
            ),
            validation=_validation(found, directory, accelerator),
        )  # fmt: skip
        if saved is not None:
            restore(training, saved)
            origin = f"continued from step {done.step:,}"
        with _reporting(training, tensorboard=tensorboard, visible=progress):
            _introduce(training, found, origin)
            training.run()
    return TrainingResult(
        directory, directory / disk.LAST, directory / disk.BEST, done.step, found.classes,
        done.figures, done.best, accelerator.is_main_process,
        None if found.valid is None else found.valid.folder,
    )  # fmt: skip


def _beginning(
    name: str | os.PathLike[str] | None,
    asked: Asked | None,
    start: str | os.PathLike[str],
    saved: dict[str, Any] | None,
    classes: tuple[str, ...],
    reference: bool,
    *,
    input_size: tuple[int, int] | None,
    seed: int,
    **common: Any,
) -> tuple[MaskRCNN, str]:
    """The detector to train, and a line about the origin of its weights.

    A saved state holds all weights, so that what they began from is not read again.
    """
    resumes = saved is not None
    if asked is not None:
        model, origin = starting_around(
            asked, classes, input_size=input_size, seed=seed, resumes=resumes, **common
        )
    else:
        assert name is not None  # noqa: S101  for the type checker
        model, origin = starting_model(
            name, SCRATCH if resumes else start, classes, input_size=input_size, seed=seed, **common
        )
    if saved is not None:
        resume_network(model, saved, asked.checkpoint if asked else None, **common)
    if reference and saved is None:
        check_reference(model, os.fspath(start))
    return model, origin


_PROGRESS = tuple(field.name for field in fields(Progress))


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be above 0, got {value}")


def _check_ranges(**values: tuple[float | None, float, float]) -> None:
    for name, (value, low, high) in values.items():
        if value is not None and not (low <= value <= high and value < math.inf):
            raise ValueError(f"{name} must lie in {low:g}..{high:g}, got {value}")


@contextlib.contextmanager
def _own_directory(out: str | os.PathLike[str], accelerator: Accelerator) -> Iterator[Path]:
    """The run's folder, which no other run may write to meanwhile."""
    directory = expanded(out).absolute()
    if not accelerator.is_main_process:
        yield directory
        return
    fresh = not directory.exists()
    with atomic.writing_to(directory):
        directory.mkdir(parents=True, exist_ok=True)
    try:
        with cache.locked(directory, directory.name, wait=False):
            yield directory
    finally:
        if fresh and {path.name for path in directory.iterdir()} <= {cache.LOCKS}:
            shutil.rmtree(directory)  # an error before the first step leaves nothing


def _saved(directory: Path, resume: bool) -> dict[str, Any] | None:
    """The state to continue from; None for a new run.

    Raises:
        ZooError: the folder holds a run and ``resume`` is not asked for.
    """
    if resume:
        return disk.read_state(directory)
    there = [name for name in (disk.STATE, disk.LOG, disk.LAST) if (directory / name).exists()]
    if there:
        raise ZooError(
            f"{directory} holds a run already ({', '.join(there)}): continue it with --resume, or "
            "choose another --out"
        )
    return None


def _recipe(base: Recipe, **changes: Any) -> Recipe:
    """The recipe with the numbers that are given, those that are not None."""
    return replace(base, **{key: value for key, value in changes.items() if value is not None})


def _settings(model: MaskRCNN, found: TrainingData, recipe: Recipe, **more: Any) -> dict[str, Any]:
    """What the weights of a run depend on, as plain data."""
    settings = {
        "model": model.row.name,
        "classes": list(found.classes),
        "images": len(found.train.samples),
        "input_size": list(model.row.input_size),
        **asdict(recipe),
        **more,
    }
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()
    }


def _progress(saved: dict[str, Any] | None, settings: dict[str, Any], directory: Path) -> Progress:
    """How far the run is that is continued; a new one otherwise.

    Raises:
        ZooError: a setting that the weights depend on differs.
    """
    if saved is None:
        return Progress()
    before = saved["settings"]
    for name, value in settings.items():
        if value != before.get(name, UNASKED.get(name)):
            raise ZooError(
                f"the run in {directory} was begun with {name} = {shown(before.get(name))}, not "
                f"{shown(value)}: continue it with the same settings, or begin another with --out"
            )
    return Progress(**{key: saved[key] for key in _PROGRESS})


@contextlib.contextmanager
def _reporting(training: Training, *, tensorboard: bool, visible: bool) -> Iterator[None]:
    """While it is open, the main process has a reporter; the directory is put in order first."""
    if not training.accelerator.is_main_process:
        yield
        return
    disk.recover(training.directory)
    disk.truncate_log(training.directory, training.progress.step)
    training.reporter = Reporter(
        training.directory,
        training.steps,
        training.progress.step,
        tensorboard=tensorboard,
        shown=visible,
    )
    try:
        yield
    finally:
        training.reporter.close()


def _validation(found: TrainingData, directory: Path, accelerator: Accelerator) -> Dataset | None:
    """The validation images, written beside the run as the scorer reads them."""
    if found.valid is None:
        return None
    annotations = directory / disk.VALIDATION
    refuse_inputs([annotations], [found.train.source, found.valid.source])
    if accelerator.is_main_process:
        write_coco(found.valid, annotations)
    accelerator.wait_for_everyone()
    return read_dataset(annotations, found.valid.folder.absolute())


def _introduce(training: Training, found: TrainingData, origin: str) -> None:
    """Say what is trained on what, once."""
    if training.reporter is None:
        return
    say, recipe = training.reporter.say, training.recipe
    say(f"{training.model.row.name}: {origin}")
    say(described(found.train, "train"))
    say(
        "valid: none, nothing is evaluated and best is the last"
        if found.valid is None
        else described(found.valid, "valid")
    )
    images = training.settings["batch_size"] * training.accumulate
    images *= training.accelerator.num_processes
    say(
        f"{recipe.epochs} epochs, {training.steps:,} steps of {images} images, learning rate "
        f"{recipe.lr:.3g} ({recipe.schedule}), on {training.accelerator.device}"
    )


def _is_wide(size: tuple[int, int] | None) -> bool:
    return size is not None and size[1] > size[0]
