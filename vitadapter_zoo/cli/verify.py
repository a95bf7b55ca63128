"""``verify``: compare the AP of a checkpoint with the published AP."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from vitadapter_zoo.cli.failures import COULD_NOT_RUN
from vitadapter_zoo.cli.models import check_presence, model_names
from vitadapter_zoo.cli.verdicts import (
    EXIT_STATUS,
    VerdictCommand,
    command_line,
    data_options,
    dataset,
    output_options,
    report_folder,
    tell,
)

if TYPE_CHECKING:
    from vitadapter_zoo.evaluation.dataset import Dataset
    from vitadapter_zoo.evaluation.options import Options
    from vitadapter_zoo.evaluation.verdict import Verification

WORST_FIRST = (COULD_NOT_RUN, *(EXIT_STATUS[it] for it in ("refuted", "inconclusive", "confirmed")))


@click.command(
    cls=VerdictCommand,
    epilog="""\b
Examples:
  vitadapter-zoo verify adapter-l-augreg-3x --coco /data/coco --report report
  vitadapter-zoo verify adapter-t-deit-3x --coco /data/coco --limit 200
  vitadapter-zoo verify adapter-n-emoji
  vitadapter-zoo verify my-model --annotations own.json --images own/ --expect 41.2 38.0
  vitadapter-zoo verify --all --coco /data/coco --report zoo
\b
Exit status: 0 confirmed, 1 refuted, 3 inconclusive, 2 could not run. With --all: 2 if any row
could not run, else 1 if any was refuted, else 3 if any was inconclusive.
""",
)
@click.argument("name", required=False, shell_complete=model_names)
@click.option("--all", "every", is_flag=True, help="Verify every published checkpoint.")
@data_options
@click.option(
    "--limit",
    type=click.IntRange(1),
    metavar="N",
    help="Evaluate only N images, a stratified random sample.",
)
@click.option(
    "--checkpoint",
    metavar="SOURCE",
    help="A file, a URL or hf://user/repo[@revision][/file] instead of the published one.",
)
@click.option(
    "--max-minutes",
    type=click.FloatRange(0, min_open=True),
    metavar="M",
    help="Start no more images after M minutes.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the sample.")
@click.option(
    "--skip-bad-images",
    is_flag=True,
    help="Skip missing and damaged images; the verdict is then inconclusive.",
)
@click.option("--device", help="cpu, cuda, cuda:1, ...  [default: cuda if available]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32")
@click.option(
    "--tf32", is_flag=True, help="Compute float32 as TF32 on CUDA: faster; needs its own run."
)
@click.option(
    "--backend", type=click.Choice(["native", "mmdet"]), default="native", show_default=True,
    help="mmdet: run the same weights in mmdet, with its own test pipeline.",
)  # fmt: skip
@click.option(
    "--batch-size", type=click.IntRange(1), default=1, show_default=True, metavar="N",
    help="Images per forward pass; each N needs its own run.",
)  # fmt: skip
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Number of worker processes.")
@click.option("--ray", metavar="auto|ADDRESS", help="Run on the nodes of a Ray cluster.")
@click.option(
    "--threads",
    type=click.IntRange(1),
    metavar="N",
    help="CPU threads per process; a run must keep the same number.",
)
@output_options
@click.option(
    "--run",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Folder that stores the results, to continue an interrupted run.",
)
@click.option("--offline", is_flag=True, help="Never use the network.")
@click.option("--quiet", is_flag=True, help="No progress line.")
@click.option("--allow-nonfinite", is_flag=True, help="Accept weights that are NaN or infinite.")
def verify(
    name: str | None,
    every: bool,
    coco: Path | None,
    annotations: Path | None,
    images: Path | None,
    ignore_exif: bool,
    limit: int | None,
    checkpoint: str | None,
    max_minutes: float | None,
    seed: int,
    expect: tuple[float, float] | None,
    skip_bad_images: bool,
    device: str | None,
    dtype: str,
    tf32: bool,
    backend: Literal["native", "mmdet"],
    batch_size: int,
    workers: int | None,
    ray: str | None,
    threads: int | None,
    run: Path | None,
    folder: Path | None,
    as_json: bool,
    offline: bool,
    quiet: bool,
    allow_nonfinite: bool,
) -> None:
    """Repeat the COCO evaluation of NAME and confirm or refute its published box and mask AP."""
    if (name is None) != every:
        raise click.UsageError("give either NAME or --all")
    if every and (checkpoint, run, expect) != (None, None, None):
        raise click.UsageError("--checkpoint, --run and --expect belong to one model, not to --all")
    has_workers = ray is not None or (workers or 1) > 1
    _check_backend(backend, has_workers=has_workers, batch_size=batch_size, ignore_exif=ignore_exif)
    folder = report_folder(folder, [annotations, checkpoint])
    data = dataset(name, coco, annotations, images, ignore_exif)
    if name is not None and ray is None:
        check_presence(name, checkpoint, offline)
    import torch

    from vitadapter_zoo.cli.devices import default_device, usable_device
    from vitadapter_zoo.evaluation.options import Options

    device = device or (default_device() if ray is None else "cpu")
    if tf32 and (dtype != "float32" or not device.startswith("cuda")):
        raise click.UsageError("--tf32 needs --device cuda and --dtype float32")
    options = Options(
        checkpoint=checkpoint,
        limit=limit,
        max_minutes=max_minutes,
        seed=seed,
        expected=expect,
        skip_bad_images=skip_bad_images,
        device=usable_device(device) if ray is None else device,
        dtype=getattr(torch, dtype),
        backend=backend,
        workers=workers,
        ray=ray,
        threads=threads,
        run=run,
        offline=offline or None,
        progress=not quiet,
        allow_nonfinite=allow_nonfinite,
        allow_tf32=tf32,
        batch_size=batch_size,
    )

    evaluate = partial(_evaluate, data=data, options=options)
    if name is not None:
        tell(evaluate(name), as_json, folder)
    else:
        _tell_all(evaluate, data.annotations, as_json, folder)


def _check_backend(backend: str, *, has_workers: bool, batch_size: int, ignore_exif: bool) -> None:
    """Refuse options that the backend does not have.

    Raises:
        click.UsageError: such an option is given.
    """
    if backend == "mmdet" and has_workers:
        raise click.UsageError("--backend mmdet runs in one process, without --workers and --ray")
    if batch_size > 1 and (backend == "mmdet" or has_workers):
        raise click.UsageError("--batch-size needs one process and the native backend")
    if backend == "mmdet" and ignore_exif:
        raise click.UsageError("--ignore-exif needs --backend native: mmdet applies EXIF rotations")


def _evaluate(model: str, data: Dataset, options: Options) -> Verification:
    """Evaluate one model, with a live line on the terminal."""
    from vitadapter_zoo.evaluation.verify import run_verification
    from vitadapter_zoo.reports import live

    with live.evaluation(data, options.progress, options.max_minutes) as watch:
        return run_verification(model, data, options, watch)


def _tell_all(
    evaluate: Callable[[str], Verification],
    annotations: Path,
    as_json: bool,
    folder: Path | None,
) -> None:
    """Evaluate every row, print the table, and exit with the worst status."""
    from vitadapter_zoo.reports import overview

    content = overview.verify_all(
        lambda row: evaluate(row.name), annotations, folder, command=command_line()
    )
    if as_json:
        click.echo(json.dumps(content, indent=2))
    else:
        overview.print_table(content)
    if folder is not None:
        click.echo(f"report: {folder / overview.PAGE}", err=True)
    statuses = {EXIT_STATUS.get(row["status"], COULD_NOT_RUN) for row in content["rows"]}
    status = next(status for status in WORST_FIRST if status in statuses)
    click.get_current_context().exit(status)
