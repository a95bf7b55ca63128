"""``verify``: evaluate a detector on COCO and compare its AP with the published one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from vitadapter_zoo import settings
from vitadapter_zoo.catalog import get_row, list_models
from vitadapter_zoo.environment import environment
from vitadapter_zoo.errors import DatasetError, ImageError
from vitadapter_zoo.evaluation import batching, ids
from vitadapter_zoo.evaluation import dataset as datasets
from vitadapter_zoo.evaluation.dataset import Dataset, Image
from vitadapter_zoo.evaluation.evaluator import (
    DECODERS,
    ENCODERS,
    Evaluator,
    MmdetEvaluator,
    stream,
    until,
)
from vitadapter_zoo.evaluation.identity import Facts, facts_of, run_directory, with_batch_size
from vitadapter_zoo.evaluation.loading import load_detector
from vitadapter_zoo.evaluation.options import Options
from vitadapter_zoo.evaluation.run import ImageResult, Run, has_begun, open_run
from vitadapter_zoo.evaluation.verdict import Verification, judge
from vitadapter_zoo.evaluation.workers.start import worker_pool
from vitadapter_zoo.text import shown

if TYPE_CHECKING:
    from vitadapter_zoo.evaluation.workers.pool import Pool
    from vitadapter_zoo.models import MaskRCNN

# Evaluates images until a deadline (of time.monotonic; None: all) and calls a function with each
# result.
Compute: TypeAlias = Callable[
    [Iterator[Image], Callable[[ImageResult], None], "float | None"], None
]
# Called after each image with the run and the images that are asked for.
Watch: TypeAlias = Callable[[Run, Sequence[Image]], None]


def verify(
    model: str | os.PathLike[str] | MaskRCNN,
    dataset: str | os.PathLike[str] | Dataset | None = None,
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
    allow_nonfinite: bool = False,
    allow_tf32: bool = False,
    batch_size: int | None = None,
    watch: Watch | None = None,
) -> Verification:
    """Evaluate a detector on COCO and compare with the published box and mask AP.

    The result of every image is stored in a run directory when it is finished. The same call
    continues an interrupted run and gives the same digits. A run directory of another checkpoint,
    data set, precision or version is refused.

    Args:
        model: load name, folder or repository as for ``load``, or a loaded detector, for example
            one fine-tuned on other classes.
        dataset: COCO's folder (``annotations/instances_val2017.json`` and ``val2017/``), or the
            result of ``vitadapter_zoo.evaluation.dataset.read_dataset`` for any data in COCO's
            format. Not needed for ``adapter-n-emoji``, whose data set is in the package.
        checkpoint: as for ``load``.
        limit: number of images to evaluate, a stratified random sample.
        max_minutes: start no more images after this time; the order of the images is that of a
            stratified random sample.
        seed: for the sample and the bootstrap.
        expected: box and mask AP in points (0..100) to compare with, measured on all of
            ``dataset``; by default the catalog's values, if they belong to ``dataset``.
        skip_bad_images: leave out images that are missing or cannot be decoded instead of
            raising an error; the verdict is then inconclusive.
        device: the network's device; the CPU by default. A loaded detector stays on its own.
        dtype: floating-point type of the weights; float32 by default. A loaded detector keeps its
            own.
        backend: ``"mmdet"`` evaluates the same weights inside mmdet, through its own test pipeline.
        workers: number of worker processes. By default this process computes alone; with ``ray``
            the default is one worker per GPU, or per node, of the cluster. On ``cuda`` the
            devices are distributed over the workers.
        ray: ``"auto"`` or the address of a Ray cluster that runs the workers; needs
            ``vitadapter-zoo[ray]``.
        threads: torch's CPU threads per worker; by default torch's own number in this process, or
            an equal share of the cores for each worker. The last bits of the results depend on
            it, so a run must keep the same number. They do not depend on the number of workers.
        run: the run directory; by default one in the cache, named by the checkpoint, the data set,
            the precision, the processor and the versions.
        cache_dir: as for ``load``.
        offline: as for ``load``.
        progress: as for ``load``.
        allow_nonfinite: as for ``load``.
        allow_tf32: let a float32 detector use TF32 on CUDA, in a run of its own. A loaded detector
            has an attribute of this name.
        batch_size: images of the same padded size per forward pass, in this process. The last bits
            of the results depend on it, so each number has its own run. By default 1 on the CPU;
            on a GPU the number of the run that is continued, or 1 to 8 by the free memory.
        watch: called after each image with the run and the list of all images to evaluate.

    Raises:
        DatasetError: the data set is missing or invalid, or its classes are not the model's.
        ImageError: an image is missing, damaged, or of another size than annotated.
        ZooError: the run directory cannot be written to, or belongs to another run; also the
            errors of ``load``.
        ValueError: ``limit``, ``max_minutes``, ``workers``, ``threads`` or ``batch_size`` too
            small; ``checkpoint``, ``device``, ``dtype`` or ``allow_tf32`` with a loaded
            detector; a loaded detector in training mode or with ``ray``; ``backend="mmdet"`` or
            ``batch_size`` above 1 with workers; or an unknown ``backend``.
        BackendError: mmdet is requested, but missing or broken.
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
        allow_nonfinite=allow_nonfinite,
        allow_tf32=allow_tf32,
        batch_size=batch_size,
    )
    return run_verification(model, dataset, options, watch)


def run_verification(
    model: str | os.PathLike[str] | MaskRCNN,
    dataset: str | os.PathLike[str] | Dataset | None,
    options: Options,
    watch: Watch | None = None,
) -> Verification:
    """Do the work of ``verify``, with the options in one object."""
    started = time.monotonic()
    data = _row_data(model) if dataset is None else _opened(dataset)
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
            facts, batch_size = _batched_facts(detector, name, data, options)
            compute = _in_process(_evaluator(detector, data, options.backend), batch_size)
        identity = facts.identity
        place = _run_place(name, identity, options)
        run = stack.enter_context(open_run(place, identity))
        before = sum(image.image_id in run.results for image in images)
        _evaluate(compute, images, run, deadline, options.skip_bad_images, watch)
        results = [run.results[image.image_id] for image in images if image.image_id in run.results]
    details = {
        "run": str(place),
        "checkpoint": None if options.checkpoint is None else os.fspath(options.checkpoint),
        "identity": identity,
        "environment": environment(),
        "images_sha256": _digest_of_images(results),
        "images_before": before,
        "seconds": time.monotonic() - started,
        "workers": pool.size if pool else 1,
        "sample_seed": options.seed if options.is_part else None,
    }
    in_catalog = identity["model"] in list_models()
    has_figures = in_catalog and data.is_measured(get_row(identity["model"]))
    published = facts.published if has_figures else None
    return judge(
        name,
        data,
        results,
        options.expected or published,
        reference="expected" if options.expected else "published",
        random_part=options.is_part,
        seed=options.seed,
        images=data.folder,
        details=details,
    )


def _run_place(name: str, identity: dict[str, Any], options: Options) -> Path:
    if options.run is not None:
        return settings.expanded(options.run)
    return run_directory(name, identity, options.cache_dir)


def _batched_facts(
    model: MaskRCNN, name: str, data: Dataset, options: Options
) -> tuple[Facts, int]:
    """The facts about a detector in this process, and its batch size.

    Where none is given, a run that has begun goes on with its own, whatever memory is free now.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    size = 1 if on_cpu and options.batch_size is None else options.batch_size
    if options.backend == "mmdet":
        size = 1
    if size is not None:
        return facts_of(model, data, options.backend, size), size
    facts = facts_of(model, data, options.backend)
    for size in batching.SIZES:
        identity = with_batch_size(facts.identity, size)
        if has_begun(_run_place(name, identity, options), identity):
            break
    else:
        size = batching.chosen_size(model)
    return replace(facts, identity=with_batch_size(facts.identity, size)), size


def _row_data(model: str | os.PathLike[str] | MaskRCNN) -> Dataset:
    """Read the data set that belongs to a row: a named one, or a loaded detector's.

    Raises:
        DatasetError: the model is a folder or repository, or its data are not in the package.
    """
    if not isinstance(model, (str, os.PathLike)):
        return datasets.row_dataset(model.row)
    if os.fspath(model) not in list_models():
        raise DatasetError(
            f"no data set belongs to {shown(os.fspath(model))!r}: give COCO's folder with "
            "--coco DIR, or other data with --annotations FILE"
        )
    return datasets.row_dataset(get_row(os.fspath(model)))


def _opened(dataset: str | os.PathLike[str] | Dataset) -> Dataset:
    if isinstance(dataset, Dataset):
        return dataset
    return datasets.read_dataset(*datasets.coco_paths(Path(dataset)))


def _check_images(images: Sequence[Image]) -> None:
    """Refuse a data set with missing image files before the evaluation starts."""
    absent = datasets.check_images(images)
    if absent:
        example = shown(absent[0].path, 300)
        raise ImageError(
            f"{len(absent):,} of {len(images):,} images are not there, {example} for "
            "instance: unpack the image archive there, or leave them out with --skip-bad-images "
            "(the verdict is then inconclusive)"
        )


def _evaluator(model: MaskRCNN, data: Dataset, backend: str) -> Evaluator:
    category_ids = data.category_ids(model.categories)
    if backend == "native":
        return Evaluator(model, category_ids, ignore_exif=data.ignore_exif)
    if data.ignore_exif:
        raise ValueError(
            "mmdet's test pipeline applies EXIF rotations: evaluate with the native backend, or "
            "save the images as they are shown and annotate those"
        )
    from vitadapter_zoo.backends.mmdet import from_native

    return MmdetEvaluator(model, category_ids, from_native(model))


def _in_process(evaluator: Evaluator, batch_size: int) -> Compute:
    on_cpu = next(evaluator.model.parameters()).device.type == "cpu"
    decoders, encoders = (1, 1) if on_cpu else (DECODERS, ENCODERS)

    def compute(
        images: Iterator[Image], keep: Callable[[ImageResult], None], deadline: float | None
    ) -> None:
        tasks = until(deadline, images)
        stream(evaluator, tasks, keep, batch_size=batch_size, decoders=decoders, encoders=encoders)

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
    """Evaluate the images for which the run has no result."""

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
    """Yield the images without a result; images that were left out are tried again."""
    for image in images:
        known = run.results.get(image.image_id)
        if known is None or known.skipped:
            yield image


def _digest_of_images(results: Sequence[ImageResult]) -> str:
    """Compute one hash over all evaluated image files."""
    digest = hashlib.sha256()
    for result in sorted(results, key=lambda one: ids.order(one.image_id)):
        digest.update(f"{result.image_id} {result.image_sha256}\n".encode())
    return digest.hexdigest()
