"""``config`` and ``compare``: print a model's mmdet configuration; compare it with mmdet."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import click

from vitadapter_zoo.cli.models import model_names
from vitadapter_zoo.finder import find
from vitadapter_zoo.settings import expanded
from vitadapter_zoo.text import shown

if TYPE_CHECKING:
    from vitadapter_zoo.backends.comparison import Difference


@click.command(
    epilog="""\b
Example:
  vitadapter-zoo config adapter-l-augreg-3x > adapter_l.py
""",
)
@click.argument("name", shell_complete=model_names)
def config(name: str) -> None:
    """Print the mmdet 2.x configuration of the model NAME, for testing and training."""
    found = find(name)
    from vitadapter_zoo.backends.mmdet_config import as_python, mmdet_config

    click.echo(as_python(mmdet_config(found.row, found.categories)), nl=False)


@click.command(
    epilog="""\b
Examples:
  vitadapter-zoo compare adapter-t-deit-3x --images *.jpg
  vitadapter-zoo compare vit-t-deit-3x --images photo.jpg --checkpoint weights.pth --json
""",
)
@click.argument("name", shell_complete=model_names)
@click.argument("more_images", nargs=-1, metavar="...")
@click.option(
    "--images", multiple=True, required=True, metavar="IMAGE...", help="Images to run both on."
)
@click.option(
    "--checkpoint",
    metavar="SOURCE",
    help="A file, a URL or hf://user/repo[@revision][/file] instead of the published one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print every image's differences as JSON.")
@click.option("--offline", is_flag=True, help="Never use the network.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def compare(
    name: str,
    more_images: tuple[str, ...],
    images: tuple[str, ...],
    checkpoint: str | None,
    as_json: bool,
    offline: bool,
    quiet: bool,
) -> None:
    """Run NAME here and in mmdet with the same weights; exit 1 if the results differ.

    Feature differences are relative to the largest value of a map. For proposals and detections the
    difference is the share without a counterpart, for boxes and masks 1 - IoU; a difference of one
    pixel along the edge of a mask does not count.
    """
    found = find(name, offline=offline or None, progress=not quiet)
    from vitadapter_zoo.images import read_image

    chosen = [expanded(image) for image in (*images, *more_images)]
    for image in chosen:
        read_image(image)  # a bad image is reported before a long download
    from vitadapter_zoo.backends.comparison import differences, native_stages, worst
    from vitadapter_zoo.backends.mmdet import from_native, stages
    from vitadapter_zoo.loader import load

    native = load(name, checkpoint=checkpoint, offline=offline or None, progress=not quiet)
    other = from_native(native)
    per_image = [
        differences(native_stages(native, image), stages(other, image)) for image in chosen
    ]
    overall = worst(per_image)
    agree = all(stage.agrees for stage in overall)
    if as_json:
        record = {
            "model": found.name,
            "agree": agree,
            "images": [
                {"image": str(image), "stages": [_record(stage) for stage in found]}
                for image, found in zip(chosen, per_image, strict=True)
            ],
        }
        click.echo(json.dumps(record, indent=2))
    else:
        _print(shown(found.name), len(chosen), overall)
    if not agree:
        raise click.exceptions.Exit(1)


def _record(stage: Difference) -> dict[str, Any]:
    measured = stage.measured if math.isfinite(stage.measured) else None
    return {
        "stage": stage.stage,
        "difference": measured,
        "limit": stage.limit,
        "agrees": stage.agrees,
    }


def _print(name: str, images: int, overall: list[Difference]) -> None:
    click.echo(f"{name}: this package and mmdet on {images} images, largest differences")
    click.echo(f"{'stage':<12} {'difference':>12} {'limit':>8}")
    for stage in overall:
        verdict = "" if stage.agrees else "  DIFFERS"
        click.echo(f"{stage.stage:<12} {stage.measured:>12.3g} {stage.limit:>8.0e}{verdict}")
    wrong = [stage.stage for stage in overall if not stage.agrees]
    click.echo(f"They differ, first in {wrong[0]}." if wrong else "They agree in every stage.")
