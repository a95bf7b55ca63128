"""``card``: print or write model cards, with measured figures where a report is given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vitadapter_zoo import settings
from vitadapter_zoo.cli.hub import chosen_names
from vitadapter_zoo.cli.models import model_names
from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.finder import Found, find
from vitadapter_zoo.text import shown

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from vitadapter_zoo.publishing.measured import Measured

README = "README.md"


@click.command(
    epilog="""\b
Examples:
  vitadapter-zoo card adapter-t-deit-3x
  vitadapter-zoo card --all --out model_cards
  vitadapter-zoo verify my-model/ --annotations own.json --images own/ --report report
  vitadapter-zoo card my-model/ --report report/report.json --in-place
"""
)
@click.argument("name", required=False, shell_complete=model_names)
@click.option("--all", "everything", is_flag=True, help="Every model of the catalog.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder to write to.")
@click.option(
    "--report",
    "report",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="report.json",
    help="Add the figures of this report of `verify`, with hashes, versions and hardware.",
)
@click.option(
    "--in-place", is_flag=True, help="Write the card of a folder, and the report, into the folder."
)
def card(
    name: str | None, everything: bool, out: Path | None, report: Path | None, in_place: bool
) -> None:
    """Print the model card of NAME, or write cards to a folder.

    NAME is a model of the catalog, or a folder that save_pretrained or train wrote.
    """
    names = chosen_names((name,) if name else (), everything)
    if report is not None and everything:
        raise click.UsageError("--report is of one model: give its NAME instead of --all")
    chosen = [find(each) for each in names]
    if in_place and not isinstance(chosen[0].place, Path):
        raise click.UsageError("--in-place writes into a folder; NAME is none")
    if out and chosen[0].place is not None:
        raise click.UsageError("--out writes the cards of the catalog; a folder has its own")
    measured = None if report is None else _measured(settings.expanded(report), chosen[0])
    folder = settings.expanded(out or Path("model_cards")) if out or everything else None
    for found in chosen:
        text = _card(found, measured)
        if in_place and isinstance(found.place, Path):
            _write(text, found.place / README, measured, _report_name(found))
        elif folder is not None:
            _write(text, folder / f"{found.row.name}.md", measured, _report_name(found))
        else:
            click.echo(str(text))


def _card(found: Found, measured: Measured | None) -> ModelCard:
    """The card of the catalog, or the folder's own with what its author wrote."""
    from huggingface_hub import ModelCard

    from vitadapter_zoo.publishing import cards
    from vitadapter_zoo.publishing.measured import add_measured

    if found.place is None:
        made = cards.card(found.row)
    elif isinstance(found.place, Path) and measured and (found.place / README).is_file():
        path = found.place / README
        try:
            made = ModelCard(path.read_text(encoding="utf-8"))
        except Exception as error:  # YAML's, the Hub library's and the file's own
            raise ZooError(
                f"cannot read the metadata of {path} ({type(error).__name__}: {shown(error)}); "
                "repair the part between the two lines of ---, or remove the file"
            ) from error
    else:
        made = cards.saved_card(found.row, found.categories)
    if measured is not None:
        name = Path(found.name).name if found.place is not None else found.row.name
        source = _report_name(found)
        add_measured(made, measured, found.row, name=name or found.row.name, source=source)
    return made


def _report_name(found: Found) -> str:
    """Return the path of the reduced report next to the card."""
    from vitadapter_zoo.publishing.measured import REPORT

    return REPORT if found.place is not None else f"{found.row.name}.{REPORT}"


def _write(text: ModelCard, target: Path, measured: Measured | None, report_name: str) -> None:
    from vitadapter_zoo.weights import atomic

    if measured is not None:
        atomic.write_json(target.parent / report_name, measured.record())
    atomic.write_text(target, str(text).rstrip() + "\n")
    click.echo(target)


def _measured(path: Path, found: Found) -> Measured:
    """The report's figures.

    Raises:
        ZooError: they are of other weights.
    """
    from vitadapter_zoo.publishing.measured import read_report

    measured = read_report(path)
    if measured.row != found.row.name or (found.place is None and not measured.by_name):
        whose = shown(measured.row) + ("" if measured.by_name else " from a folder or another file")
        raise ZooError(
            f"{shown(path, 300)} is of another model than {shown(found.name, 300)} ({whose}): give "
            "the report of this model"
        )
    if isinstance(found.place, Path):
        _check_weights(path, measured, found.place)
    return measured


def _check_weights(path: Path, measured: Measured, folder: Path) -> None:
    import torch

    from vitadapter_zoo.evaluation.identity import weights_sha256
    from vitadapter_zoo.loader import load

    dtypes = {str(kind).removeprefix("torch."): kind
              for kind in (torch.float32, torch.float16, torch.bfloat16)}  # fmt: skip
    model = load(folder, dtype=dtypes.get(measured.precision))
    if weights_sha256(model) != measured.weights_sha256:
        raise ZooError(
            f"{shown(path, 300)} is of other weights than those in {folder}: verify the folder "
            "again and give that report"
        )
