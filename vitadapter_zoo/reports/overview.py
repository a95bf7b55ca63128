"""``verify --all``: every published checkpoint, with one page and one JSON file for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vitadapter_zoo import settings
from vitadapter_zoo.catalog import PUBLISHED, Row
from vitadapter_zoo.errors import OfflineError, ZooError
from vitadapter_zoo.evaluation.scoring import NOTHING
from vitadapter_zoo.evaluation.verdict import Verdict, Verification
from vitadapter_zoo.reports import page, report
from vitadapter_zoo.text import shown
from vitadapter_zoo.weights import atomic, cache

PAGE, FIGURES_FILE = "index.html", "index.json"


@dataclass(frozen=True)
class Figures:
    """An AP of a row in points (0..100); None if it is not known or was not measured."""

    published: float | None
    measured: float | None = None
    difference: float | None = None


@dataclass(frozen=True)
class Outcome:
    """The outcome of a row.

    Attributes:
        model: load name.
        status: the verdict; failed if the row could not run, pending before its turn.
        reason: of the verdict, or the error.
        box: box AP.
        mask: mask AP.
        report: path of the row's own page, relative to the index.
        offline: whether it failed because its weights need a network that is away or not to be
            used.
    """

    model: str
    status: Verdict | Literal["failed", "pending"]
    reason: str
    box: Figures
    mask: Figures
    report: str | None = None
    offline: bool = False


def verify_all(
    evaluate: Callable[[Row], Verification],
    annotations: Path,
    directory: Path | None,
    *,
    command: str | None = None,
    rows: Sequence[Row] = PUBLISHED,
) -> dict[str, Any]:
    """Evaluate the rows in turn; a row that fails does not stop the others.

    Args:
        evaluate: verifies a row.
        annotations: the annotation file.
        directory: where ``index.html``, ``index.json`` and a folder for each row are written,
            again after each row; None writes nothing.
        command: the command line, for the index.
        rows: of the catalog.

    Returns:
        The content of index.json.

    Raises:
        ZooError: ``directory`` cannot be written to.
    """
    outcomes = {
        row.name: Outcome(row.name, "pending", "not yet evaluated", *_published(row))
        for row in rows
    }
    content: dict[str, Any] = {}
    for row in rows:
        try:
            found = evaluate(row)
        except (KeyboardInterrupt, SystemExit):
            raise
        # Also one that nobody expects, or a panic in Rust, which is no Exception: the others run.
        except BaseException as error:
            outcomes[row.name] = Outcome(
                row.name, "failed", _reason(error), *_published(row),
                offline=isinstance(error, OfflineError),
            )  # fmt: skip
        else:
            place = None if directory is None else f"{row.name}/{report.PAGE}"
            if directory is not None:
                report.write(found, directory / row.name, command=command)
            box, mask = (
                Figures(one.published, one.measured, one.difference) for one in found.comparisons
            )
            outcomes[row.name] = Outcome(
                row.name, found.verdict, found.reason, box, mask, report=place
            )
        content = {
            "date": atomic.now(),
            "command": command,
            "annotations": str(annotations),
            "rows": [asdict(outcome) for outcome in outcomes.values()],
        }
        if directory is not None:
            _write(content, directory)
    return content


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, ZooError) else f"{type(error).__name__}: {shown(error)}"


def _published(row: Row) -> tuple[Figures, Figures]:
    return Figures(row.box_ap), Figures(row.mask_ap)


def _write(content: dict[str, Any], directory: Path) -> None:
    with cache.locked(settings.home(), f"report-{cache.digest(str(directory.resolve()))}"):
        atomic.write_json(directory / FIGURES_FILE, content)
        atomic.write_text(directory / PAGE, page.index(content))


def print_table(content: dict[str, Any]) -> None:
    """Print published, measured, difference and verdict of every row."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, caption="published, measured, difference")
    table.add_column("model", no_wrap=True)
    table.add_column("box AP", justify="right", no_wrap=True)
    table.add_column("mask AP", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in content["rows"]:
        color = report.COLORS.get(row["status"], "red")
        verdict = f"[{color}]{row['status']}[/{color}]"
        table.add_row(row["model"], _cell(row["box"]), _cell(row["mask"]), verdict)
    console.print(table)
    away = [row for row in content["rows"] if row["offline"]]
    for row in content["rows"]:
        if row["status"] == "failed" and (row not in away or len(away) == 1):
            console.print(f"{row['model']}: {escape(row['reason'])}", soft_wrap=True)
    if len(away) > 1:
        console.print(
            f"The weights of {len(away)} models are not in the cache, and the network cannot be "
            "used. For the first of them:"
        )
        console.print(f"  {escape(away[0]['reason'])}", soft_wrap=True)
        console.print("`vitadapter-zoo download --all` fetches them with a connection.")


def _cell(figures: dict[str, float | None]) -> str:
    """Published, measured and difference, aligned with those of the other rows."""
    published, measured, difference = (
        figures[name] for name in ("published", "measured", "difference")
    )
    unknown = measured is None or measured == NOTHING
    return (
        ("-" if published is None else f"{published:.1f}").rjust(4)
        + ("-" if unknown else f"{measured:.2f}").rjust(6)
        + ("-" if difference is None else f"{difference:+.1f}").rjust(6)
    )
