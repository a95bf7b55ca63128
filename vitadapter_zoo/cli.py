"""The command ``vitadapter-zoo``. torch and rich are imported only where they are used."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vitadapter_zoo import __version__, cache
from vitadapter_zoo.catalog import Row, get_row, list_models
from vitadapter_zoo.errors import UnknownModelError, ZooError

if TYPE_CHECKING:
    from vitadapter_zoo.detections import Detections

WIDE = 110  # columns that the whole table takes


class _ZooGroup(click.Group):
    """Turns the zoo's errors into one line on stderr and exit status 1, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ZooError as error:
            raise click.ClickException(str(error)) from error


@click.group(
    cls=_ZooGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  vitadapter-zoo list --filter 'adapter-*'
  vitadapter-zoo info adapter-l-augreg-3x
  vitadapter-zoo predict photo.jpg --model adapter-t-deit-3x --out overlays
""",
)
@click.version_option(__version__, prog_name="vitadapter-zoo")
def main() -> None:
    """ViT-Adapter + Mask R-CNN checkpoints on current PyTorch."""


@main.command(
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
        _print_table(rows)


@main.command(epilog="\b\nExample:\n  vitadapter-zoo info adapter-b-uniperceiver-3x\n")
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


@main.command(
    epilog="""\b
Examples:
  vitadapter-zoo predict photo.jpg --model adapter-t-deit-3x
  vitadapter-zoo predict *.jpg --model adapter-l-augreg-3x --checkpoint weights.pth --json
""",
)
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--model", "name", required=True, metavar="NAME", help="Load name, see `list`.")
@click.option(
    "--checkpoint",
    metavar="PATH_OR_URL",
    help="A .pth, .pth.tar or .safetensors file or its URL instead of the published one.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("predictions"),
    show_default=True,
    help="Directory for the overlay pictures.",
)
@click.option("--json", "as_json", is_flag=True, help="Print COCO results as JSON on stdout.")
@click.option(
    "--score",
    type=click.FloatRange(0, 1),
    default=0.3,
    show_default=True,
    help="Lowest score that is drawn, printed and written.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
def predict(
    images: Sequence[str],
    name: str,
    checkpoint: str | None,
    out: Path,
    as_json: bool,
    score: float,
    device: str,
) -> None:
    """Detect objects in IMAGE... and write pictures with what was found."""
    from vitadapter_zoo.images import read_image

    row = get_row(name)
    for image in images:
        read_image(image)  # a wrong picture is told before a long download
    from vitadapter_zoo.loader import load

    model = load(row.name, checkpoint=checkpoint, device=_device(device))
    targets = _overlay_paths(images, out)
    results = []
    for index, (image, target) in enumerate(zip(images, targets, strict=True)):
        detections = model.predict(image, score_threshold=score)[0]
        _save_overlay(detections, image, target)
        if as_json:
            found = detections.to_coco(index)
            results.append({"image": image, "overlay": str(target), "detections": found})
        else:
            click.echo(f"{image}: {len(detections)} detections, drawn in {target}")
            for line in _by_class(detections):
                click.echo(f"  {line}")
    if as_json:
        click.echo(json.dumps(results))


def _by_class(detections: Detections) -> list[str]:
    """One line per class: how many, and the best score; the best class first."""
    scores: dict[str, list[float]] = {}
    for name, score in zip(detections.class_names, detections.scores.tolist(), strict=True):
        scores.setdefault(name, []).append(score)
    return [f"{len(found):4d} {name} (best score {found[0]:.2f})" for name, found in scores.items()]


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ZooError(f"the device {name!r} cannot be used here: {reason}") from error
    return device


def _overlay_paths(images: Sequence[str], out: Path) -> list[Path]:
    """One PNG per image; images of the same name in different folders get a number."""
    taken: set[Path] = set()
    paths = []
    for image in images:
        path = out / f"{Path(image).stem}.png"
        number = 2
        while path in taken:
            path = out / f"{Path(image).stem}-{number}.png"
            number += 1
        taken.add(path)
        paths.append(path)
    return paths


def _save_overlay(detections: Detections, image: str, target: Path) -> None:
    picture = detections.draw(image)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(target)
    except OSError as error:
        raise ZooError(f"cannot write {target}: {error.strerror or error}") from error


def _record(row: Row) -> dict[str, Any]:
    record = asdict(row)
    record["pretraining"] = row.pretraining_name
    record["pretraining_url"] = row.pretraining_url
    record["box_gain"] = row.box_gain
    record["mask_gain"] = row.mask_gain
    record["cached_bytes"] = _cached_bytes(row)
    return record


def _cached_bytes(row: Row) -> int | None:
    """Size of the converted published weights in the cache, None where they are not there."""
    provenance = cache.entry(row.name, row.checkpoint_url).read()
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


def _print_table(rows: list[Row]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)  # in a file or a pipe the table keeps all its columns
    wide = console.width >= WIDE
    table = Table(
        title="ViT-Adapter + Mask R-CNN on COCO val2017, as published",
        caption="in green: the gain over the plain ViT of the same size and pretraining",
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
