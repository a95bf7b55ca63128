"""``export``: write a detector for ONNX Runtime, OpenVINO, torch.export or AOTInductor."""

from __future__ import annotations

import re
from typing import Literal

import click

from vitadapter_zoo.cli.models import model_names
from vitadapter_zoo.settings import expanded
from vitadapter_zoo.text import PATH, shown

Format = Literal["onnx", "openvino", "pt2", "aoti"]


def _sizes(
    _context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[int, int], ...]:
    """Read ``HEIGHTxWIDTH``, pixels."""
    sizes = []
    for value in values:
        found = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", value)
        if found is None:
            raise click.BadParameter(f"{shown(value)!r} is not a size such as 800x1216")
        sizes.append((int(found[1]), int(found[2])))
    return tuple(sizes)


@click.command(
    epilog="""\b
Examples:
  vitadapter-zoo export adapter-n-emoji --format onnx --size 256x320
  vitadapter-zoo export adapter-t-deit-3x --format openvino --size 800x1216 --size 1216x800
"""
)
@click.argument("name", shell_complete=model_names)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["onnx", "openvino", "pt2", "aoti"]),
    required=True,
    help="onnx and openvino use standard operators only; pt2 (torch.export) and aoti "
    "(AOTInductor) need this package where they run.",
)
@click.option(
    "--size",
    "sizes",
    metavar="HxW",
    multiple=True,
    callback=_sizes,
    help="Height and width of the input, multiples of 32; may be repeated. Default: that of a "
    "landscape image of the row's size.",
)
@click.option("--out", default="exported", show_default=True, help="Folder to write to.")
@click.option(
    "--precision",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="float16 stores the weights of an OpenVINO file in float16.",
)
@click.option("--image", help="Picture for the comparison. Default: one in the package.")
@click.option("--checkpoint", help="File or URL of other weights of this model.")
@click.option("--force", is_flag=True, help="Replace the files of an earlier export.")
@click.option("--offline", is_flag=True, help="Use cached files only.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def export(
    name: str,
    kind: Format,
    sizes: tuple[tuple[int, int], ...],
    out: str,
    precision: Literal["float32", "float16"],
    image: str | None,
    checkpoint: str | None,
    force: bool,
    offline: bool,
    quiet: bool,
) -> None:
    """Write a detector for another runtime, one file for each size.

    NAME is whatever `load` takes. Each file is run on a picture and compared with the detector,
    stage by stage, before it appears; a file that computes something else is an error. A JSON file
    with names, sizes and normalisation, and postprocess.py, which needs numpy only, lie beside it.
    """
    from vitadapter_zoo.exporting.export import export as write
    from vitadapter_zoo.exporting.formats import STAGES_OF
    from vitadapter_zoo.loader import load

    model = load(
        name, checkpoint=checkpoint, offline=offline or None, progress=not quiet, device="cpu"
    )
    written = write(
        model,
        expanded(out),
        format=kind,
        sizes=sizes or None,
        precision=precision,
        image=None if image is None else expanded(image),
        force=force,
    )
    for one in written:
        click.echo(f"{shown(one.path, PATH)}: largest differences from the detector")
        click.echo(f"  before the detections: {STAGES_OF[kind]}; the rest: the file itself")
        for stage in one.differences:
            click.echo(f"  {stage.stage:<12} {stage.measured:>9.2g}, at most {stage.limit:.2g}")
