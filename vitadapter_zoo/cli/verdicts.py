"""What ``verify`` and ``score`` share: options for the data set, exit statuses, the outcome."""

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
REPORT = click.Path(path_type=Path, file_okay=False)
REPORT_HELP = "Write report.html, report.json and the detections there."


class VerdictCommand(click.Command):
    """A command that an interrupt stops without loss of results."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
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
    """A folder; a number, which ``--images`` took before, is refused."""

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


def check_points(
    context: click.Context, parameter: click.Parameter, value: tuple[float, float] | None
) -> tuple[float, float] | None:
    """Refuse an AP outside of 0..100, or one that is not a number."""
    if value is not None and not all(0 <= points <= 100 for points in value):
        raise click.BadParameter("an AP lies in 0..100")
    return value


def data_options(command: Any) -> Any:
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


def dataset(
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


def report_folder(folder: Path | None, inputs: Sequence[Any]) -> Path | None:
    """The folder of the report; one that cannot be used is an error before the hours of work.

    Args:
        folder: of the option; None where there is to be no report.
        inputs: the files that the command reads; None stands for one that is not given.
    """
    from vitadapter_zoo.reports import report

    if folder is None:
        return None
    folder = settings.expanded(folder)
    report.check_folder(folder, inputs)
    return folder


def tell(found: Verification, as_json: bool, folder: Path | None) -> None:
    """Write the report, print the outcome, and exit with the verdict's status."""
    from vitadapter_zoo.reports import report

    if folder is not None:  # first: standard output may be full or closed
        report.write(found, folder, command=command_line())
    if as_json:
        click.echo(json.dumps(report.record(found), indent=2))
    else:
        report.print_table(found)
    if folder is not None:
        click.echo(f"report: {folder / report.PAGE}", err=True)
    click.get_current_context().exit(EXIT_STATUS[found.verdict])


def command_line() -> str:
    """The command line, for the report."""
    return shlex.join(["vitadapter-zoo", *sys.argv[1:]])
