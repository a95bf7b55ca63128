"""``verify`` and ``score``: does a checkpoint give its published AP?"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from vitadapter_zoo.catalog import get_row
from vitadapter_zoo.errors import ZooError

if TYPE_CHECKING:
    from vitadapter_zoo.evaluation.dataset import Dataset
    from vitadapter_zoo.evaluation.verdict import Verification

EXIT_STATUS = {"confirmed": 0, "refuted": 1, "inconclusive": 3}
COULD_NOT_RUN = 2
WORST_FIRST = (COULD_NOT_RUN, *(EXIT_STATUS[it] for it in ("refuted", "inconclusive", "confirmed")))
REPORT = click.Path(path_type=Path, file_okay=False)
REPORT_HELP = "Write report.html, report.json and the detections there."


class _CouldNotRunError(click.ClickException):
    """Told like every error, with the exit status of ``verify``."""

    exit_code = COULD_NOT_RUN


class _VerdictCommand(click.Command):
    """Exit status 1 means refuted here, so that whatever keeps it from running gives 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ZooError as error:
            raise _CouldNotRunError(str(error)) from error
        except KeyboardInterrupt:
            click.echo("\nstopped; the same command continues where it was", err=True)
            raise


class _CountOrFolder(click.ParamType[Any]):
    """``--images 200`` is a number of images, ``--images DIR`` the folder that they lie in."""

    name = "N|DIR"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | Path:
        if not isinstance(value, str):
            return value
        if value.isdigit():
            if int(value) < 1:
                self.fail("at least one image is needed", param, ctx)
            return int(value)
        return Path(value)


def _coco_options(command: Any) -> Any:
    """The options that name a data set."""
    for option in (
        click.option(
            "--annotations",
            type=click.Path(path_type=Path, dir_okay=False),
            help="An annotation file in COCO's format, instead of --coco.",
        ),
        click.option(
            "--coco",
            type=click.Path(path_type=Path, file_okay=False),
            metavar="DIR",
            help="COCO's folder: annotations/instances_val2017.json and val2017/.",
        ),
    ):
        command = option(command)
    return command


@click.command(
    cls=_VerdictCommand,
    epilog="""\b
Examples:
  vitadapter-zoo verify adapter-l-augreg-3x --coco /data/coco --report report
  vitadapter-zoo verify adapter-t-deit-3x --coco /data/coco --images 200
  vitadapter-zoo verify my-model --annotations own.json --images own/ --expect 41.2 38.0
  vitadapter-zoo verify --all --coco /data/coco --report zoo
\b
Exit status: 0 confirmed, 1 refuted, 3 inconclusive, 2 could not run. With --all: 2 if any row
could not run, else 1 if any was refuted, else 3 if any was inconclusive.
""",
)
@click.argument("name", required=False)
@click.option("--all", "every", is_flag=True, help="Every checkpoint of the catalog in turn.")
@_coco_options
@click.option(
    "--images",
    "choices",
    type=_CountOrFolder(),
    multiple=True,
    help="A number: evaluate so many, a stratified random sample. Or the image folder that belongs "
    "to --annotations. Both by giving it twice.",
)
@click.option("--checkpoint", metavar="SOURCE", help="As for `predict`.")
@click.option("--max-minutes", type=click.FloatRange(0, min_open=True), help="Stop after that.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sample.")
@click.option(
    "--expect",
    type=(float, float),
    metavar="BOX MASK",
    help="Compare with these APs (0..100) on the whole of the data, instead of the published.",
)
@click.option("--skip-bad-images", is_flag=True, help="Leave them out; ends inconclusive.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32")
@click.option(
    "--backend", type=click.Choice(["native", "mmdet"]), default="native", show_default=True,
    help="mmdet: the same weights inside mmdet, through its own test pipeline.",
)  # fmt: skip
@click.option("--workers", type=click.IntRange(1), help="Compute in so many processes.")
@click.option("--ray", metavar="auto|ADDRESS", help="Compute on the nodes of a Ray cluster.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of each; kept to in a run.")
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
    choices: tuple[int | Path, ...],
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
    counts = [choice for choice in choices if isinstance(choice, int)]
    folders = [choice for choice in choices if isinstance(choice, Path)]
    if len(counts) > 1 or len(folders) > 1:
        raise click.UsageError("--images takes one number and one folder at most")
    if folders and annotations is None:
        raise click.UsageError("--images DIR goes with --annotations")
    if (name is None) != every:
        raise click.UsageError("give either NAME or --all")
    if backend == "mmdet" and (ray is not None or (workers or 1) > 1):
        raise click.UsageError("--backend mmdet runs in one process, without --workers and --ray")
    if every and (checkpoint, run, expect) != (None, None, None):
        raise click.UsageError("--checkpoint, --run and --expect belong to one model, not to --all")
    _check(folder)
    data = _dataset(coco, annotations, folders[0] if folders else None)
    import torch

    from vitadapter_zoo.cli.predict import usable_device
    from vitadapter_zoo.evaluation.options import Options
    from vitadapter_zoo.evaluation.verify import run_verification
    from vitadapter_zoo.reports import live

    options = Options(
        checkpoint=checkpoint,
        limit=counts[0] if counts else None,
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

    def evaluate(model: str) -> Verification:
        with live.evaluation(data.annotations, not quiet, max_minutes) as watch:
            return run_verification(model, data, options, watch)

    if name is not None:
        _tell(evaluate(name), as_json, folder)
    else:
        _tell_all(evaluate, data.annotations, as_json, folder)


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
@_coco_options
@click.option("--model", "name", required=True, metavar="NAME", help="Load name, see `list`.")
@click.option(
    "--expect",
    type=(float, float),
    metavar="BOX MASK",
    help="Compare with these APs (0..100), instead of the published.",
)
@click.option("--report", "folder", type=REPORT, help=REPORT_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print every figure as JSON.")
def score(
    results: Path,
    coco: Path | None,
    annotations: Path | None,
    name: str,
    expect: tuple[float, float] | None,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Judge a file of COCO results from elsewhere, of the original code for example."""
    started = time.monotonic()
    row = get_row(name)
    _check(folder)
    data = _dataset(coco, annotations, None)
    from vitadapter_zoo.evaluation.results_file import read_results
    from vitadapter_zoo.evaluation.scoring import versions
    from vitadapter_zoo.evaluation.verdict import judge
    from vitadapter_zoo.weights import atomic

    published = expect or ((row.box_ap, row.mask_ap) if data.is_val2017 else None)
    judged = read_results(results, data)
    details = {
        "results": str(results),
        "results_sha256": atomic.sha256(results),
        "annotations_sha256": data.sha256,
        "environment": {"versions": versions()},
    }
    images = data.folder if coco is not None else None
    found = judge(row.name, data, judged, published, images=images, details=details)
    found.details["seconds"] = time.monotonic() - started
    _tell(found, as_json, folder)


def _dataset(coco: Path | None, annotations: Path | None, images: Path | None) -> Dataset:
    from vitadapter_zoo.evaluation.dataset import coco_paths, read_dataset

    if (coco is None) == (annotations is None):
        raise click.UsageError("give either --coco DIR or --annotations FILE")
    if annotations is not None:
        return read_dataset(annotations, images if images is not None else annotations.parent)
    return read_dataset(*coco_paths(coco or Path()))


def _check(folder: Path | None) -> None:
    """Tell of a report that cannot be written before the hours that lead to it."""
    from vitadapter_zoo.reports import report

    if folder is not None:
        report.check_folder(folder)


def _tell(found: Verification, as_json: bool, folder: Path | None) -> None:
    """Print what was found, write the report, and leave with the verdict's exit status."""
    from vitadapter_zoo.reports import report

    if as_json:
        click.echo(json.dumps(report.record(found), indent=2))
    else:
        report.print_table(found)
    if folder is not None:
        report.write(found, folder, command=_command())
        click.echo(f"report: {folder / report.PAGE}", err=True)
    sys.exit(EXIT_STATUS[found.verdict])


def _tell_all(
    evaluate: Callable[[str], Verification],
    annotations: Path,
    as_json: bool,
    folder: Path | None,
) -> None:
    """Evaluate and print every row, and leave with the worst one's exit status."""
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
    sys.exit(next(status for status in WORST_FIRST if status in statuses))


def _command() -> str:
    """What was typed, for those who want to repeat it."""
    return shlex.join(["vitadapter-zoo", *sys.argv[1:]])
