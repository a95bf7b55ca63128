"""``list`` and ``info``: what the catalog knows."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from vitadapter_zoo.catalog import Row, get_row, list_models
from vitadapter_zoo.errors import UnknownModelError
from vitadapter_zoo.weights import cache
from vitadapter_zoo.weights.source import LocalFile, parse

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 110  # columns that the whole table takes


@click.command(
    "list",
    epilog="""\b
Examples:
  vitadapter-zoo list
  vitadapter-zoo list --filter '*-l-*' --json
""",
)
@click.option("--filter", "pattern", metavar="GLOB", help="Only names that fit, like 'adapter-*'.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON with every field.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV with every field.")
def list_command(pattern: str | None, as_json: bool, as_csv: bool) -> None:
    """List the checkpoints with their published figures."""
    if as_json and as_csv:
        raise click.UsageError("choose one of --json and --csv")
    rows = [get_row(name) for name in list_models(pattern)]
    if not rows:
        raise UnknownModelError(f"no model fits {pattern!r}; `vitadapter-zoo list` shows them all")
    if as_json:
        click.echo(json.dumps([_record(row) for row in rows], indent=2))
    elif as_csv:
        _print_csv([_record(row) for row in rows])
    else:
        _print_tables(rows)


@click.command(epilog="\b\nExample:\n  vitadapter-zoo info adapter-b-uniperceiver-3x\n")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(name: str, as_json: bool) -> None:
    """Show everything the catalog knows of the model NAME."""
    record = _record(get_row(name))
    if as_json:
        click.echo(json.dumps(record, indent=2))
        return
    for key, value in record.items():
        if isinstance(value, (list, tuple)):
            value = ", ".join(str(item) for item in value)
        click.echo(f"{key:<16} {'-' if value is None or value == '' else value}")


def _record(row: Row) -> dict[str, Any]:
    record = asdict(row)
    record["pretraining"] = row.pretraining_name
    record["pretraining_url"] = row.pretraining_url
    record["box_gain"] = row.box_gain
    record["mask_gain"] = row.mask_gain
    record["cached_bytes"] = _cached_bytes(row)
    return record


def _cached_bytes(row: Row) -> int | None:
    """Size of the weights on this machine, None where they are not there.

    Published weights are converted in the cache; those made here are in the package.
    """
    if row.made_here:
        source = parse(row.checkpoint_url)
        if isinstance(source, LocalFile) and source.path.is_file():
            return source.path.stat().st_size
        return None
    provenance = cache.entry(row.name, str(parse(row.checkpoint_url))).read()
    return provenance.size if provenance else None


def _print_csv(records: list[dict[str, Any]]) -> None:
    """Comma-separated values with a header; lists are written as JSON."""
    writer = csv.DictWriter(sys.stdout, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow(
            {
                key: json.dumps(value) if isinstance(value, (list, tuple)) else value
                for key, value in record.items()
            }
        )


def _print_tables(rows: list[Row]) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)  # in a file or a pipe the tables keep all their columns
    published = [row for row in rows if not row.made_here]
    if published:
        _print_table(
            console,
            published,
            "ViT-Adapter + Mask R-CNN on COCO val2017, as published",
            "in green: the gain over the plain ViT of the same size and pretraining",
        )
    made_here = [row for row in rows if row.made_here]
    if made_here:
        _print_table(
            console,
            made_here,
            "Made here: trained by this package on its own images, weights included",
            "measured on 200 images of emoji in this package; not comparable with COCO's figures",
        )


def _print_table(console: Console, rows: list[Row], title: str, caption: str) -> None:
    from rich import box
    from rich.table import Table

    wide = console.width >= WIDE
    table = Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        collapse_padding=True,
    )
    table.add_column("name", style="cyan", no_wrap=True)
    if wide:  # a narrow terminal loses what the name says as well
        table.add_column("backbone", no_wrap=True)
        table.add_column("pretraining", no_wrap=True)
        table.add_column("FPN", justify="center")
    table.add_column("sched.", no_wrap=True)
    table.add_column("box AP", justify="right", no_wrap=True)
    table.add_column("mask AP", justify="right", no_wrap=True)
    table.add_column("params", justify="right", no_wrap=True)
    table.add_column("cached", justify="right", no_wrap=True)
    for row in rows:
        cached = _cached_bytes(row)
        extra = (row.backbone, row.pretraining_name, "yes" if row.fpn else "no") if wide else ()
        table.add_row(
            row.name,
            *extra,
            row.schedule,
            _with_gain(row.box_ap, row.box_gain),
            _with_gain(row.mask_ap, row.mask_gain),
            f"{row.parameters}M",
            f"{cached / 1e6:.0f} MB" if cached else "-",
        )
    console.print(table)


def _with_gain(value: float, gain: float | None) -> str:
    return f"{value:.1f}" if gain is None else f"{value:.1f} [green]+{gain:.1f}[/green]"
