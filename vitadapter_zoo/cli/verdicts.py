"""Shared by ``verify`` and ``score``: options, the data set, exit statuses, printing a verdict."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vitadapter_zoo import settings
from vitadapter_zoo.catalog import get_row, list_models

if TYPE_CHECKING:
    from vitadapter_zoo.evaluation.dataset import Dataset
    from vitadapter_zoo.evaluation.verdict import Verification

EXIT_STATUS = {"confirmed": 0, "refuted": 1, "inconclusive": 3}


class VerdictCommand(click.Command):
    """A command whose run can be interrupted and continued."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; after Ctrl-C say how to continue."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("\nstopped; the same command continues from here", err=True)
            raise


if TYPE_CHECKING:
    _PathType = click.ParamType[Path]
else:
    _PathType = click.ParamType  # before 8.4 it takes no type argument


class _ImageFolder(_PathType):
    """A folder. A number, which ``--images`` took in the past, is refused."""

    name = "DIR"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if isinstance(value, str) and value.isdigit() and not settings.expanded(value).is_dir():
            self.fail(
                f"--images takes the folder of the image files; to evaluate {value} of the images, "
                f"write --limit {value}",
                param,
                ctx,
            )
        return Path(value)


def _check_points(
    context: click.Context, parameter: click.Parameter, value: tuple[float, float] | None
) -> tuple[float, float] | None:
    """Refuse an AP outside of 0..100, or one that is not a number."""
    if value is not None and not all(0 <= points <= 100 for points in value):
        raise click.BadParameter("an AP lies in 0..100")
    return value


def output_options(command: Any) -> Any:
    """Add the options for the expected AP and for the output."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print every figure as JSON."),
        click.option(
            "--report",
            "folder",
            type=click.Path(path_type=Path, file_okay=False),
            metavar="DIR",
            help="Write report.html, report.json and the detections into this folder.",
        ),
        click.option(
            "--expect",
            type=(float, float),
            metavar="BOX MASK",
            callback=_check_points,
            help="Compare with these APs (0..100) of the whole data set instead of the published.",
        ),
    ):
        command = option(command)
    return command


def data_options(command: Any) -> Any:
    """Add the options that name the data set."""
    for option in (
        click.option(
            "--ignore-exif",
            is_flag=True,
            help="Read images without applying the rotation in their EXIF data, for annotations "
            "that were made that way.",
        ),
        click.option(
            "--images",
            type=_ImageFolder(),
            help="Folder of the image files of --annotations.  [default: the folder of that file]",
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
            help="COCO's folder, with annotations/instances_val2017.json and val2017/. Not needed "
            "for adapter-n-emoji, whose data set is in the package.",
        ),
    ):
        command = option(command)
    return command


def dataset(
    name: str | None,
    coco: Path | None,
    annotations: Path | None,
    images: Path | None,
    ignore_exif: bool,
) -> Dataset:
    """Read the data set that the options name; without options, the one of the row ``name``.

    Raises:
        click.UsageError: options that exclude each other, or no data set.
        DatasetError: the data set is missing or invalid.
    """
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


def report_folder(folder: Path | None, inputs: Sequence[Any]) -> Path | None:
    """Check the folder of the report before hours of computation, and return it.

    Args:
        folder: the value of ``--report``; None for no report.
        inputs: the files that the command reads, or None for each that is not given.

    Raises:
        ZooError: the report cannot be written there, or would replace an input.
    """
    from vitadapter_zoo.reports import report

    if folder is None:
        return None
    folder = settings.expanded(folder)
    report.check_folder(folder, inputs)
    return folder


def tell(found: Verification, as_json: bool, folder: Path | None) -> None:
    """Write the report, print the verdict, and exit with its status."""
    from vitadapter_zoo.reports import report

    if folder is not None:  # before printing, which fails if stdout is closed
        report.write(found, folder, command=command_line())
    if as_json:
        click.echo(json.dumps(report.record(found), indent=2))
    else:
        report.print_table(found)
    if folder is not None:
        click.echo(f"report: {folder / report.PAGE}", err=True)
    click.get_current_context().exit(EXIT_STATUS[found.verdict])


def command_line() -> str:
    """Return the command line, for the report."""
    return shlex.join(["vitadapter-zoo", *sys.argv[1:]])
