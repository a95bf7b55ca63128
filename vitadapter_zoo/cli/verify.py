"""``verify`` and ``score``: compare the AP of a checkpoint or a result file with the published."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from vitadapter_zoo import settings
from vitadapter_zoo.catalog import get_row, list_models
from vitadapter_zoo.cli.failures import COULD_NOT_RUN

if TYPE_CHECKING:
    from vitadapter_zoo.evaluation.dataset import Dataset
    from vitadapter_zoo.evaluation.options import Options
    from vitadapter_zoo.evaluation.verdict import Verification

EXIT_STATUS = {"confirmed": 0, "refuted": 1, "inconclusive": 3}
WORST_FIRST = (COULD_NOT_RUN, *(EXIT_STATUS[it] for it in ("refuted", "inconclusive", "confirmed")))
REPORT = click.Path(path_type=Path, file_okay=False)
REPORT_HELP = "Write report.html, report.json and the detections there."


class _VerdictCommand(click.Command):
    """A command that an interrupt stops without loss of results."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("\nstopped; the same command continues from here", err=True)
            raise


class _ImageFolder(click.ParamType[Path]):
    """A folder; a number, which ``--images`` took before, is refused."""

    name = "DIR"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if isinstance(value, str) and value.isdigit() and not Path(value).is_dir():
            self.fail(
                f"--images takes the folder of the image files; to evaluate {value} of the images, "
                f"write --limit {value}",
                param,
                ctx,
            )
        return Path(value)


def _data_options(command: Any) -> Any:
    """The options that name a data set."""
    for option in (
        click.option(
            "--ignore-exif",
            is_flag=True,
            help="Read images as they are stored, without the rotation of their EXIF data, if they "
            "were annotated that way.",
        ),
        click.option(
            "--images",
            type=_ImageFolder(),
            help="The folder of the image files of --annotations; by default its own folder.",
        ),
        click.option(
            "--annotations",
            type=click.Path(path_type=Path, dir_okay=False),
            help="An annotation file in COCO's format, instead of --coco.",
        ),
        click.option(
            "--coco",
            type=click.Path(path_type=Path, file_okay=False),
            metavar="DIR",
            help="COCO's folder: annotations/instances_val2017.json and val2017/. Not needed for "
            "adapter-n-emoji, which has its data in the package.",
        ),
    ):
        command = option(command)
    return command


@click.command(
    cls=_VerdictCommand,
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
@click.argument("name", required=False)
@click.option("--all", "every", is_flag=True, help="Every published checkpoint in turn.")
@_data_options
@click.option(
    "--limit",
    type=click.IntRange(1),
    metavar="N",
    help="Evaluate N images only, a stratified random sample.",
)
@click.option("--checkpoint", metavar="SOURCE", help="As for `predict`.")
@click.option(
    "--max-minutes",
    type=click.FloatRange(0, min_open=True),
    help="Start no further image after M minutes.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the sample.")
@click.option(
    "--expect",
    type=(float, float),
    metavar="BOX MASK",
    help="Compare with these APs (0..100) of the whole data set, not with the published.",
)
@click.option(
    "--skip-bad-images",
    is_flag=True,
    help="Leave out missing and damaged images; the verdict is inconclusive.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32")
@click.option(
    "--backend", type=click.Choice(["native", "mmdet"]), default="native", show_default=True,
    help="mmdet: the same weights inside mmdet, through its own test pipeline.",
)  # fmt: skip
@click.option("--workers", type=click.IntRange(1), help="Number of processes.")
@click.option("--ray", metavar="auto|ADDRESS", help="Run on the nodes of a Ray cluster.")
@click.option(
    "--threads",
    type=click.IntRange(1),
    help="CPU threads of each process; the same in all of a run.",
)
@click.option("--run", type=click.Path(path_type=Path, file_okay=False), help="Run directory.")
@click.option("--report", "folder", type=REPORT, help=REPORT_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print every figure as JSON.")
@click.option("--offline", is_flag=True, help="Never use the network.")
@click.option("--quiet", is_flag=True, help="No progress.")
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
    device: str,
    dtype: str,
    backend: Literal["native", "mmdet"],
    workers: int | None,
    ray: str | None,
    threads: int | None,
    run: Path | None,
    folder: Path | None,
    as_json: bool,
    offline: bool,
    quiet: bool,
) -> None:
    """Re-run COCO's evaluation of NAME and confirm or refute the published box and mask AP."""
    if (name is None) != every:
        raise click.UsageError("give either NAME or --all")
    if backend == "mmdet" and (ray is not None or (workers or 1) > 1):
        raise click.UsageError("--backend mmdet runs in one process, without --workers and --ray")
    if backend == "mmdet" and ignore_exif:
        raise click.UsageError("--ignore-exif needs --backend native: mmdet applies EXIF rotations")
    if every and (checkpoint, run, expect) != (None, None, None):
        raise click.UsageError("--checkpoint, --run and --expect belong to one model, not to --all")
    folder = _report_folder(folder)
    data = _dataset(name, coco, annotations, images, ignore_exif)
    import torch

    from vitadapter_zoo.cli.predict import usable_device
    from vitadapter_zoo.evaluation.options import Options

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
    )

    evaluate = partial(_evaluate, data=data, options=options)
    if name is not None:
        _tell(evaluate(name), as_json, folder)
    else:
        _tell_all(evaluate, data.annotations, as_json, folder)


def _evaluate(model: str, data: Dataset, options: Options) -> Verification:
    """Evaluate one model, with the live line on the terminal."""
    from vitadapter_zoo.evaluation.verify import run_verification
    from vitadapter_zoo.reports import live

    with live.evaluation(data, options.progress, options.max_minutes) as watch:
        return run_verification(model, data, options, watch)


@click.command(
    cls=_VerdictCommand,
    epilog="""\b
Example:
  vitadapter-zoo score results.json --coco /data/coco --model adapter-t-deit-3x
\b
Exit status: as for `verify`.
""",
)
@click.argument("results", type=click.Path(path_type=Path, dir_okay=False))
@_data_options
@click.option("--model", "name", required=True, metavar="NAME", help="Load name, see `list`.")
@click.option(
    "--expect",
    type=(float, float),
    metavar="BOX MASK",
    help="Compare with these APs (0..100), not with the published.",
)
@click.option("--report", "folder", type=REPORT, help=REPORT_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print every figure as JSON.")
def score(
    results: Path,
    coco: Path | None,
    annotations: Path | None,
    images: Path | None,
    ignore_exif: bool,
    name: str,
    expect: tuple[float, float] | None,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Score a file of COCO results, for example from the original code, and give a verdict."""
    started = time.monotonic()
    row = get_row(name)
    results, folder = settings.expanded(results), _report_folder(folder)
    data = _dataset(name, coco, annotations, images, ignore_exif)
    from vitadapter_zoo.evaluation.results_file import read_results
    from vitadapter_zoo.evaluation.scoring import versions
    from vitadapter_zoo.evaluation.verdict import judge
    from vitadapter_zoo.weights import atomic

    published = (row.box_ap, row.mask_ap) if data.is_measured(row) else None
    judged = read_results(results, data)
    details = {
        "results": str(results),
        "results_sha256": atomic.sha256(results),
        "annotations_sha256": data.sha256,
        "environment": {"versions": versions()},
    }
    found = judge(
        row.name,
        data,
        judged,
        expect or published,
        reference="expected" if expect else "published",
        images=None if annotations is not None and images is None else data.folder,
        details=details,
    )
    found.details["seconds"] = time.monotonic() - started
    _tell(found, as_json, folder)


def _dataset(
    name: str | None,
    coco: Path | None,
    annotations: Path | None,
    images: Path | None,
    ignore_exif: bool,
) -> Dataset:
    """The data set of the options, or without them that of the row ``name``."""
    from vitadapter_zoo.evaluation.dataset import coco_paths, read_dataset, row_dataset

    if images is not None and annotations is None:
        raise click.UsageError("--images DIR goes with --annotations")
    if coco is None and annotations is None and name in list_models(table=3):
        return row_dataset(get_row(name))
    if (coco is None) == (annotations is None):
        raise click.UsageError("give either --coco DIR or --annotations FILE")
    if annotations is None:
        annotations, images = coco_paths(coco or Path())
    return read_dataset(annotations, images or annotations.parent, ignore_exif=ignore_exif)


def _report_folder(folder: Path | None) -> Path | None:
    """The folder of the report; one that cannot be written is an error before the hours of work."""
    from vitadapter_zoo.reports import report

    if folder is None:
        return None
    folder = settings.expanded(folder)
    report.check_folder(folder)
    return folder


def _tell(found: Verification, as_json: bool, folder: Path | None) -> None:
    """Print the outcome, write the report, and exit with the verdict's status."""
    from vitadapter_zoo.reports import report

    if as_json:
        click.echo(json.dumps(report.record(found), indent=2))
    else:
        report.print_table(found)
    if folder is not None:
        report.write(found, folder, command=_command())
        click.echo(f"report: {folder / report.PAGE}", err=True)
    click.get_current_context().exit(EXIT_STATUS[found.verdict])


def _tell_all(
    evaluate: Callable[[str], Verification],
    annotations: Path,
    as_json: bool,
    folder: Path | None,
) -> None:
    """Evaluate and print every row, and exit with the status of the worst."""
    from vitadapter_zoo.reports import overview

    content = overview.verify_all(
        lambda row: evaluate(row.name), annotations, folder, command=_command()
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


def _command() -> str:
    """The command line, for the report."""
    return shlex.join(["vitadapter-zoo", *sys.argv[1:]])
