"""Does a checkpoint give its published AP? COCO's evaluation, a verdict, and what it rests on."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from vitadapter_zoo import settings
from vitadapter_zoo.environment import environment
from vitadapter_zoo.errors import ImageError
from vitadapter_zoo.evaluation import dataset as datasets
from vitadapter_zoo.evaluation.dataset import Dataset, Image
from vitadapter_zoo.evaluation.evaluator import Evaluator, MmdetEvaluator, stream, until
from vitadapter_zoo.evaluation.identity import facts_of, run_directory
from vitadapter_zoo.evaluation.loading import load_detector
from vitadapter_zoo.evaluation.options import Options
from vitadapter_zoo.evaluation.run import ImageResult, Run, open_run
from vitadapter_zoo.evaluation.verdict import Verification, judge
from vitadapter_zoo.evaluation.workers.start import worker_pool

if TYPE_CHECKING:
    from vitadapter_zoo.evaluation.workers.pool import Pool
    from vitadapter_zoo.models import MaskRCNN

# Evaluates images, handing each result on, until a moment of time.monotonic (None: all).
Compute: TypeAlias = Callable[
    [Iterator[Image], Callable[[ImageResult], None], "float | None"], None
]
# Called after each image with the run and the images that are asked for.
Watch: TypeAlias = Callable[[Run, Sequence[Image]], None]


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
    watch: Watch | None = None,
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
    options = Options(
        checkpoint=checkpoint,
        limit=limit,
        max_minutes=max_minutes,
        seed=seed,
        expected=expected,
        skip_bad_images=skip_bad_images,
        device=device,
        dtype=dtype,
        backend=backend,
        workers=workers,
        ray=ray,
        threads=threads,
        run=run,
        cache_dir=cache_dir,
        offline=offline,
        progress=progress,
    )
    return run_verification(model, dataset, options, watch)


def run_verification(
    model: str | os.PathLike[str] | MaskRCNN,
    dataset: str | os.PathLike[str] | Dataset,
    options: Options,
    watch: Watch | None = None,
) -> Verification:
    """What ``verify`` does, with its options in one object."""
    started = time.monotonic()
    data = _opened(dataset)
    images = list(data.images)
    if options.is_part:
        images = datasets.sampling_order(data, options.seed)[: options.limit]
    if not options.skip_bad_images:
        _check_images(images)
    deadline = None if options.max_minutes is None else started + 60 * options.max_minutes
    pool: Pool | None = None
    compute: Compute
    with contextlib.ExitStack() as stack:
        if options.has_workers:
            pool, name = worker_pool(model, data, options, len(images), stack)
            facts, compute = pool.facts(), pool.evaluate
        else:
            stack.enter_context(_torch_threads(options.threads))
            detector, name = load_detector(model, options)
            facts = facts_of(detector, data, options.backend)
            compute = _in_process(_evaluator(detector, data, options.backend))
        identity = facts.identity
        place = (
            run_directory(name, identity, options.cache_dir)
            if options.run is None
            else Path(options.run)
        )
        run = stack.enter_context(open_run(place, identity))
        before = sum(image.image_id in run.results for image in images)
        _evaluate(compute, images, run, deadline, options.skip_bad_images, watch)
        results = [run.results[image.image_id] for image in images if image.image_id in run.results]
    details = {
        "run": str(place),
        "identity": identity,
        "environment": environment(),
        "images_sha256": _digest_of_images(results),
        "images_before": before,
        "seconds": time.monotonic() - started,
        "workers": pool.size if pool else 1,
        "sample_seed": options.seed if options.is_part else None,
    }
    return judge(
        name,
        data,
        results,
        options.expected or (facts.published if data.is_val2017 else None),
        random_part=options.is_part,
        seed=options.seed,
        images=data.folder,
        details=details,
    )


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


def _evaluate(
    compute: Compute,
    images: Sequence[Image],
    run: Run,
    deadline: float | None,
    skip_bad_images: bool,
    watch: Watch | None,
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
    for result in sorted(results, key=lambda one: one.image_id):
        digest.update(f"{result.image_id} {result.image_sha256}\n".encode())
    return digest.hexdigest()
