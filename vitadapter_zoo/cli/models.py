"""``list`` and ``info``: show the catalog, and describe one model of it or a saved one."""

from __future__ import annotations

import csv
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from vitadapter_zoo.catalog import (
    COCO_CLASSES,
    DINOV2,
    MADE_HERE,
    ROWS,
    Row,
    get_row,
    list_models,
)
from vitadapter_zoo.errors import UnknownModelError
from vitadapter_zoo.finder import Found, cached_bytes, find
from vitadapter_zoo.text import PATH, shown
from vitadapter_zoo.weights import presence
from vitadapter_zoo.weights.source import parse

if TYPE_CHECKING:
    from rich.console import Console

NARROW = 80  # columns in a pipe or a file
INDENT = 14  # columns before a text of `info`
WIDE = 112  # columns with what the name says as well

# Seconds for an image of 640 x 480 pixels: benchmarks/verify.py --hours 20, 2 cores (AVX-512).
# DINOv2's rows are the networks of the other pretrainings and compute the same.
SECONDS = {
    "adapter-t-deit-1x": 2.8, "vit-t-deit-3x": 1.8, "adapter-t-deit-3x": 2.7, "vit-s-deit-3x": 2.8,
    "adapter-s-deit-3x": 3.9, "vit-b-deit-3x": 6.4, "adapter-b-deit-3x": 7.9,
    "adapter-b-uniperceiver-3x": 7.9, "vit-l-augreg-3x": 15.3, "adapter-l-augreg-3x": 17.6,
    "adapter-s-deit-3x-nofpn": 3.3, "adapter-s-dinov2-3x": 3.9, "adapter-b-dinov2-3x": 7.9,
    "adapter-l-dinov2-3x": 17.6,
}  # fmt: skip
# MB above the loaded model for an image of 800 x 1216: benchmarks/inference.py --memory.
MEMORY = {"T": 440, "S": 570, "B": 650, "L": 780}

ADVICE = {
    "adapter-t-deit-1x": "Trained for 12 epochs. Take adapter-t-deit-3x, the same network trained "
    "longer, unless you compare with a 1x schedule.",
    "adapter-t-deit-3x": "The fastest with good results: for a CPU, for trying things out.",
    "adapter-s-deit-3x": "The best balance of speed and accuracy in the paper's tables. "
    "adapter-s-dinov2-3x is the same network with 3.3 AP more.",
    "adapter-s-deit-3x-nofpn": "The ablation without an FPN. Take adapter-s-deit-3x, unless you "
    "compare necks.",
    "adapter-b-deit-3x": "Take adapter-b-dinov2-3x, which is as fast and 4.5 AP better, unless you "
    "need ImageNet-only pretraining.",
    "adapter-b-uniperceiver-3x": "Close to adapter-l-augreg-3x in less than half of its time. "
    "adapter-b-dinov2-3x is as fast and 2.9 AP better.",
    "adapter-n-emoji": "Tests and demonstrations: small, quick and offline.",
    "adapter-l-augreg-3x": "The most accurate of the paper's tables. adapter-l-dinov2-3x is as "
    "fast and 3.2 AP better.",
    "adapter-s-dinov2-3x": "The best balance of speed and accuracy.",
    "adapter-b-dinov2-3x": "Close to the best accuracy in less than half of the time of L.",
    "adapter-l-dinov2-3x": "The most accurate: for a GPU, or where time does not matter.",
}


def model_names(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """For the shell's completion: load names, and folders."""
    names = [CompletionItem(name) for name in list_models() if name.startswith(incomplete)]
    return names or [CompletionItem(incomplete, type="dir")]


def check_presence(name: str, checkpoint: str | None, offline: bool) -> None:
    """Fail at once, before torch is imported, where weights need a network that is away.

    Raises:
        OfflineError: the weights are not on this machine and cannot be downloaded.
    """
    if name in list_models():
        row = get_row(name)
        presence.check(row, parse(checkpoint or row.checkpoint_url), offline=offline or None)


@click.command(
    "list",
    epilog="""\b
Examples:
  vitadapter-zoo list
  vitadapter-zoo list --filter '*-l-*' --json
  vitadapter-zoo list --filter 'adapter-*' --exclude '*-1x' --exclude '*-nofpn'
""",
)
@click.option(
    "--filter",
    "patterns",
    metavar="GLOB",
    multiple=True,
    help="Only names that fit, like 'adapter-*'; may be repeated.",
)
@click.option(
    "--exclude", metavar="GLOB", multiple=True, help="Leave out names that fit; may be repeated."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON with every field.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV with every field.")
def list_command(
    patterns: Sequence[str], exclude: Sequence[str], as_json: bool, as_csv: bool
) -> None:
    """List the checkpoints with their published figures."""
    if as_json and as_csv:
        raise click.UsageError("choose one of --json and --csv")
    rows = [get_row(name) for name in list_models(patterns or None, exclude_filters=exclude)]
    if not rows:
        wanted = " or ".join(f"'{shown(pattern)}'" for pattern in patterns) or "what is left"
        raise UnknownModelError(f"no model fits {wanted}; `vitadapter-zoo list` shows them all")
    if as_json:
        click.echo(json.dumps([_record(row) for row in rows], indent=2))
    elif as_csv:
        _print_csv([_record(row) for row in rows])
    else:
        _print_tables(rows)


@click.command(
    epilog="""\b
Examples:
  vitadapter-zoo info adapter-b-uniperceiver-3x
  vitadapter-zoo info my-model/ --json
"""
)
@click.argument("name", shell_complete=model_names)
@click.option("--json", "as_json", is_flag=True, help="Print JSON with every field.")
@click.option("--offline", is_flag=True, help="Never use the network.")
def info(name: str, as_json: bool, offline: bool) -> None:
    """Show what is known of the model NAME: a load name, a folder, or user/repo on the Hub."""
    found = find(name, offline=offline or None)
    if as_json:
        click.echo(json.dumps(_record_of(found), indent=2))
        return
    for line in _described(found):
        click.echo(line)


def _described(found: Found) -> list[str]:
    row = found.row
    lines = [
        shown(found.name, PATH)
        if found.place is None
        else f"{shown(found.place, PATH)}, a saved {row.name}",
        f"  {row.backbone} with Mask R-CNN, {'FPN' if row.fpn else 'no FPN'}, "
        f"{row.parameters} million parameters",
    ]
    if found.place is None:
        lines += _published(row)
    else:
        lines += _facts({"weights": f"{found.dtype}{_size_of(found.place)}"})
    lines += _facts(
        {
            "classes": _classes(found.categories),
            "input": f"longest side {row.input_size[0]}, shortest {row.input_size[1]} pixels",
        }
    )
    if found.place is None:
        lines += _facts({"license": row.license, "paper": row.paper, "config": row.config})
        lines += _facts({"notes": row.notes} if row.notes else {})
        lines.append(f"  vitadapter-zoo predict photo.jpg --model {row.name}")
    return lines


def _facts(facts: dict[str, str]) -> list[str]:
    """Lines of a name and a text; long texts go on in the same column."""
    lines = []
    for key, value in facts.items():
        wrapped = _wrapped(value) or [""]
        lines.append(f"  {key:<{INDENT - 2}}{wrapped[0]}")
        lines += [" " * INDENT + part for part in wrapped[1:]]
    return lines


def _wrapped(text: str) -> list[str]:
    """Lines for the terminal; addresses are never broken."""
    return textwrap.wrap(text, NARROW - INDENT, break_long_words=False, break_on_hyphens=False)


def _published(row: Row) -> list[str]:
    """What is known of a row of the catalog beyond its network."""
    gains = [
        "" if gain is None else f" (+{gain:.1f} over the plain ViT)"
        for gain in (row.box_gain, row.mask_gain)
    ]
    measured = "its own 200 images" if row.made_here else "COCO val2017, as published"
    facts = {
        "box AP": f"{row.box_ap:.1f}{gains[0]}",
        "mask AP": f"{row.mask_ap:.1f}{gains[1]} on {measured}",
        "trained": f"{row.schedule}, from {row.pretraining_name.removeprefix('from ')}",
    }
    advice = ADVICE.get(row.name)
    if row.plain is None and not row.has_adapter:
        better = next((one for one in list_models() if get_row(one).plain == row), None)
        advice = f"The baseline without an adapter. {better} is more accurate." if better else None
    if advice:
        facts["advice"] = advice
    if row.name in SECONDS:
        memory = f", {MEMORY[row.size]} MB beside the weights" if row.has_adapter else ""
        facts["an image"] = f"{SECONDS[row.name]:.1f} s on 2 CPU cores{memory}"
    cached = cached_bytes(row)
    if row.made_here:
        facts["download"] = "none: the weights are in the package"
    elif cached:
        facts["download"] = f"done: {cached / 1e6:.0f} MB in the cache"
    else:
        facts["download"] = f"{_download_size(row)}, once"
    facts["from"] = row.checkpoint_url
    return _facts(facts)


def _download_size(row: Row) -> str:
    if row.file_bytes is not None:
        return f"{row.file_bytes / 1e6:.0f} MB"
    # Published as float32, but for one file, of 56 MB.
    return f"about {56 if row.name == 'adapter-t-deit-1x' else 4 * row.parameters} MB"


def _classes(categories: Sequence[str]) -> str:
    if tuple(categories) == COCO_CLASSES:
        return "COCO's 80"
    named = ", ".join(shown(name, 40) for name in categories[:8])
    more = f", and {len(categories) - 8} more" if len(categories) > 8 else ""
    return f"{len(categories)}: {named}{more}"


def _size_of(place: object) -> str:
    """Of the weights in a local folder."""
    if not isinstance(place, Path):
        return ""
    size = sum(path.stat().st_size for path in place.glob("*.safetensors"))
    return f", {size / 1e6:.0f} MB"


def _record_of(found: Found) -> dict[str, Any]:
    if found.place is None:
        return _record(found.row)
    return {
        **_record(found.row),
        "name": found.name,
        "place": str(found.place),
        "base": found.row.name,
        "classes": list(found.categories),
        "dtype": found.dtype,
        # The figures are those of the published weights, not of these.
        **dict.fromkeys(("box_ap", "mask_ap", "box_gain", "mask_gain", "cached_bytes")),
    }


def _record(row: Row) -> dict[str, Any]:
    record = asdict(row)
    record["pretraining"] = row.pretraining_name
    record["pretraining_url"] = row.pretraining_url
    record["box_gain"] = row.box_gain
    record["mask_gain"] = row.mask_gain
    record["cached_bytes"] = cached_bytes(row)
    return record


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
        console = Console(width=NARROW)
    for members, title, caption in (
        (
            ROWS,
            "ViT-Adapter + Mask R-CNN on COCO val2017, as published",
            "+: over the plain ViT of the same size and pretraining",
        ),
        (
            DINOV2,
            "From DINOv2's pretraining, beyond the paper's tables",
            "on COCO val2017, as published later by the same authors",
        ),
        (
            MADE_HERE,
            "Made here: trained by this package on its own images, weights included",
            "measured on 200 images of emoji in this package; not comparable with COCO's figures",
        ),
    ):
        chosen = [row for row in rows if row in members]
        if chosen:
            _print_table(console, chosen, title, caption)


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
    if wide:
        table.add_column("backbone", no_wrap=True)
        table.add_column("pretraining", no_wrap=True)
        table.add_column("FPN", justify="center")
    table.add_column("sched.", no_wrap=True)
    table.add_column("box AP", justify="right", no_wrap=True)
    table.add_column("mask AP", justify="right", no_wrap=True)
    table.add_column("params", justify="right", no_wrap=True)
    table.add_column("cached", justify="right", no_wrap=True)
    for row in rows:
        cached = cached_bytes(row)
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
    if any(row.made_here for row in rows):
        click.echo("adapter-n-emoji is for demonstrations, its figures are of its own images.")


def _with_gain(value: float, gain: float | None) -> str:
    return f"{value:.1f}" if gain is None else f"{value:.1f} [green]+{gain:.1f}[/green]"
