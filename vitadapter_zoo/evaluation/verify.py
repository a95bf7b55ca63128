"""Does a checkpoint give its published AP? COCO's evaluation, a verdict, and what it rests on."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from vitadapter_zoo import settings
from vitadapter_zoo.catalog import list_models
from vitadapter_zoo.environment import environment
from vitadapter_zoo.errors import ImageError
from vitadapter_zoo.evaluation import dataset as datasets
from vitadapter_zoo.evaluation import ids
from vitadapter_zoo.evaluation.dataset import Dataset, Image
from vitadapter_zoo.evaluation.evaluator import Evaluator, MmdetEvaluator, stream, until
from vitadapter_zoo.evaluation.identity import facts_of, run_directory
from vitadapter_zoo.evaluation.run import ImageResult, Run, open_run
from vitadapter_zoo.evaluation.verdict import Verification, judge

if TYPE_CHECKING:
    from vitadapter_zoo.evaluation.workers.pool import Pool
    from vitadapter_zoo.models import MaskRCNN

# Evaluates images, handing each result on, until a moment of time.monotonic (None: all).
Compute: TypeAlias = Callable[
    [Iterator[Image], Callable[[ImageResult], None], "float | None"], None
]


@dataclass(frozen=True)
class _Wanted:
    """The detector that is asked for, and how it is loaded: arguments of ``verify``."""

    model: str | os.PathLike[str] | MaskRCNN
    checkpoint: str | os.PathLike[str] | None
    device: str | torch.device | None
    dtype: torch.dtype | None
    cache_dir: settings.Home
    offline: bool | None
    progress: bool


def verify(
    model: str | os.PathLike[str] | MaskRCNN,
    dataset: str | os.PathLike[str] | Dataset,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    max_minutes: float | None = None,
    seed: int = 0,
    expected: tuple[float, float] | None = None,
    skip_bad_images: bool = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    backend: Literal["native", "mmdet"] = "native",
    workers: int | None = None,
    ray: str | None = None,
    threads: int | None = None,
    run: str | os.PathLike[str] | None = None,
    cache_dir: settings.Home = None,
    offline: bool | None = None,
    progress: bool = True,
    watch: Callable[[Run, Sequence[Image]], None] | None = None,
) -> Verification:
    """Evaluate a detector on COCO and compare with the published box and mask AP.

    Every image's result is kept in a run directory as it is finished. The same call continues an
    interrupted run, to the same digits; a run of another checkpoint, data set, precision or version
    is refused.

    Args:
        model: load name, folder or repository as for ``load``, or a loaded detector, fine-tuned on
            other classes for instance.
        dataset: COCO's folder (``annotations/instances_val2017.json`` and ``val2017/``), or what
            ``vitadapter_zoo.evaluation.dataset.read_dataset`` gives for any data in COCO's format.
        checkpoint: as for ``load``.
        limit: evaluate only so many images, a stratified random sample.
        max_minutes: begin no further image after that time; the images are then taken in the
            order of a stratified random sample.
        seed: of the sample and the bootstrap.
        expected: box and mask AP in points (0..100) to compare with, on all of ``dataset``; by
            default the published values where ``dataset`` is val2017.
        skip_bad_images: leave out images that are missing or cannot be decoded, instead of
            raising; the verdict is then inconclusive.
        device: where the network computes; the CPU by default. A loaded detector stays where it
            is.
        dtype: floating-point type of the weights; float32 by default, a loaded detector's own.
        backend: ``"mmdet"`` evaluates the same weights inside mmdet, through its own test pipeline.
        workers: how many processes compute; by default this one alone, and with ``ray`` one for
            each GPU, or each node, of the cluster. On ``cuda`` they take the devices in turn.
        ray: ``"auto"`` or the address of a Ray cluster whose nodes compute; needs
            ``vitadapter-zoo[ray]``.
        threads: of torch, for each worker, on the CPU; by default torch's own number in this
            process, and the cores shared out among workers. The last bits of the results depend
            on it, and on nothing else of how the work is divided: a run keeps to one number.
        run: the run directory; by default one in the cache that belongs to the checkpoint, the
            data set, the precision, the processor and the versions.
        cache_dir: as for ``load``.
        offline: as for ``load``.
        progress: as for ``load``.
        watch: called after each image with the run and the images that are asked for.

    Raises:
        DatasetError: the data set is absent or wrong, or its classes are not the model's.
        ImageError: an image is missing, damaged, or of another size than annotated.
        ZooError: the run directory cannot be written to, or belongs to another run; and what
            ``load`` raises.
        ValueError: ``limit``, ``max_minutes``, ``workers`` or ``threads`` below what makes sense;
            ``checkpoint``, ``device`` or ``dtype`` beside a loaded detector, or one in training
            mode, or one with ``ray``; ``backend="mmdet"`` with workers; or no such ``backend``.
        BackendError: mmdet is asked for and is missing or broken.
    """
    if backend not in ("native", "mmdet"):
        raise ValueError(f"backend={backend!r}: there are 'native' and 'mmdet'")
    if backend == "mmdet" and (ray is not None or (workers or 1) > 1):
        raise ValueError("the mmdet backend runs in this process: leave workers and ray out")
    if (limit is not None and limit < 1) or (max_minutes is not None and max_minutes <= 0):
        raise ValueError("limit and max_minutes must be above 0")
    if (workers is not None and workers < 1) or (threads is not None and threads < 1):
        raise ValueError("workers and threads must be at least 1")
    started = time.monotonic()
    deadline = None if max_minutes is None else started + 60 * max_minutes
    data = _opened(dataset)
    is_part = limit is not None or max_minutes is not None
    images = datasets.sampling_order(data, seed)[:limit] if is_part else list(data.images)
    if not skip_bad_images:
        _check_images(images)
    wanted = _Wanted(model, checkpoint, device, dtype, cache_dir, offline, progress)
    with contextlib.ExitStack() as stack:
        if backend == "mmdet" or (ray is None and (workers or 1) == 1):
            stack.enter_context(_torch_threads(threads))
            detector, name = _loaded(wanted)
            compute = _in_process(_evaluator(detector, data, backend))
            facts, pool = facts_of(detector, data, backend), None
        else:
            pool, name = _worker_pool(wanted, data, workers, len(images), ray, threads, stack)
            facts, compute = pool.facts(), pool.evaluate
        identity = facts.identity
        place = Path(run) if run is not None else run_directory(name, identity, cache_dir)
        opened = stack.enter_context(open_run(place, identity))
        before = sum(image.image_id in opened.results for image in images)
        _evaluate(compute, images, opened, deadline, skip_bad_images, watch)
        results = [
            opened.results[image.image_id] for image in images if image.image_id in opened.results
        ]
    published = expected or (facts.published if data.is_val2017 else None)
    details = {
        "run": str(place),
        "identity": identity,
        "environment": environment(),
        "images_sha256": _digest_of_images(results),
        "images_before": before,
        "seconds": time.monotonic() - started,
        "workers": pool.size if pool else 1,
        "sample_seed": seed if is_part else None,
    }
    return judge(
        name, data, results, published,
        random_part=is_part, seed=seed, images=data.folder, details=details,
    )  # fmt: skip


def _opened(dataset: str | os.PathLike[str] | Dataset) -> Dataset:
    if isinstance(dataset, Dataset):
        return dataset
    return datasets.read_dataset(*datasets.coco_paths(Path(dataset).expanduser()))


def _check_images(images: Sequence[Image]) -> None:
    """Tell of missing files before the first hour, not in it."""
    absent = datasets.check_images(images)
    if absent:
        raise ImageError(
            f"{len(absent):,} of {len(images):,} images are not there, {absent[0].path} for "
            "instance: unpack the image archive there, or leave them out with --skip-bad-images "
            "(the verdict is then inconclusive)"
        )


def _loaded(wanted: _Wanted) -> tuple[MaskRCNN, str]:
    """The detector and what it is called."""
    from vitadapter_zoo.loader import load
    from vitadapter_zoo.models import MaskRCNN

    if isinstance(wanted.model, MaskRCNN):
        _check_loaded(wanted.model, wanted)
        return wanted.model, wanted.model.row.name
    detector = load(
        wanted.model,
        checkpoint=wanted.checkpoint,
        device=wanted.device or "cpu",
        dtype=wanted.dtype,
        cache_dir=wanted.cache_dir,
        offline=wanted.offline,
        progress=wanted.progress,
    )
    return detector, os.fspath(wanted.model)


def _check_loaded(model: MaskRCNN, wanted: _Wanted) -> None:
    """Refuse to change a detector that belongs to the caller."""
    if (wanted.checkpoint, wanted.device, wanted.dtype) != (None, None, None):
        raise ValueError(
            "a loaded detector has its weights, device and dtype: leave checkpoint, device and "
            "dtype out"
        )
    if model.training:
        raise ValueError("the detector is in training mode: call model.eval() first")


def _evaluator(model: MaskRCNN, data: Dataset, backend: str) -> Evaluator:
    category_ids = data.category_ids(model.categories)
    if backend == "native":
        return Evaluator(model, category_ids)
    from vitadapter_zoo.backends.mmdet import from_native

    return MmdetEvaluator(model, category_ids, from_native(model))


def _in_process(evaluator: Evaluator) -> Compute:
    def compute(
        images: Iterator[Image], keep: Callable[[ImageResult], None], deadline: float | None
    ) -> None:
        stream(evaluator, until(deadline, images), keep)

    return compute


@contextlib.contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _worker_pool(
    wanted: _Wanted,
    data: Dataset,
    workers: int | None,
    most: int,
    ray: str | None,
    threads: int | None,
    stack: contextlib.ExitStack,
) -> tuple[Pool, str]:
    """Workers, no more than ``most``, that end with the stack; and what the detector is called."""
    from vitadapter_zoo.evaluation.workers.pool import Spec
    from vitadapter_zoo.models import MaskRCNN
    from vitadapter_zoo.publishing.pretrained import save_pretrained

    model, checkpoint = wanted.model, wanted.checkpoint
    source = None if checkpoint is None else _absolute(os.fspath(checkpoint))
    if isinstance(model, MaskRCNN):
        _check_loaded(model, wanted)
        if ray is not None:
            raise ValueError(
                "a loaded detector stays on this machine: write it with save_pretrained to a "
                "folder that every node sees, or push_to_hub, and give verify that place"
            )
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vitadapter-zoo-"))
        path, name = os.fspath(save_pretrained(model, folder)), model.row.name
        where = next(model.parameters()).device
    else:
        name = os.fspath(model)
        path = name if name in list_models() else _absolute(name)
        where = torch.device(wanted.device or "cpu")
    home = None if wanted.cache_dir is None else Path(wanted.cache_dir).absolute()
    slim = replace(data, images=(), objects=())
    spec = Spec(path, source, str(where), wanted.dtype, home, wanted.offline, threads, slim)
    if ray is not None:
        from vitadapter_zoo.evaluation.workers.ray_cluster import actors

        return stack.enter_context(actors(spec, ray, workers, most)), name
    from vitadapter_zoo.evaluation.workers.processes import processes

    if not isinstance(model, MaskRCNN):
        # Once for all of them: it is downloaded where somebody sees how far it is.
        _loaded(replace(wanted, model=path, checkpoint=source, device="cpu", dtype=None))
    return stack.enter_context(processes(spec, min(workers or 1, max(1, most)))), name


def _absolute(name: str) -> str:
    """What a worker in another directory finds too: a file or folder by its whole path."""
    path = Path(name).expanduser()
    return os.fspath(path.absolute()) if path.exists() else name


def _evaluate(
    compute: Compute,
    images: Sequence[Image],
    run: Run,
    deadline: float | None,
    skip_bad_images: bool,
    watch: Callable[[Run, Sequence[Image]], None] | None,
) -> None:
    """Evaluate what the run does not have yet."""

    def keep(result: ImageResult) -> None:
        if result.skipped and not skip_bad_images:
            raise ImageError(
                f"{result.skipped}; restore the file, or leave it out with --skip-bad-images (the "
                "verdict is then inconclusive)"
            )
        run.append(result)
        if watch is not None:
            watch(run, images)

    compute(_todo(images, run), keep, deadline)


def _todo(images: Sequence[Image], run: Run) -> Iterator[Image]:
    """The images without a result; those that were left out before are tried again."""
    for image in images:
        known = run.results.get(image.image_id)
        if known is None or known.skipped:
            yield image


def _digest_of_images(results: Sequence[ImageResult]) -> str:
    """One hash over the image files that were evaluated."""
    digest = hashlib.sha256()
    for result in sorted(results, key=lambda one: ids.order(one.image_id)):
        digest.update(f"{result.image_id} {result.image_sha256}\n".encode())
    return digest.hexdigest()
