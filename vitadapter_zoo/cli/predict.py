"""``predict``: find objects in pictures, folders, videos and camera streams."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vitadapter_zoo.cli import predict_output as output
from vitadapter_zoo.cli.devices import default_device, usable_device
from vitadapter_zoo.cli.models import check_presence, model_names
from vitadapter_zoo.errors import ZooError

if TYPE_CHECKING:
    from vitadapter_zoo.images.sources import Source
    from vitadapter_zoo.models import MaskRCNN

LONGEST_INDEX = 6  # digits of a camera's index
CHECKED = 100  # inputs that are decoded before the model is loaded


@click.command(
    epilog="""\b
Examples:
  vitadapter-zoo predict photo.jpg --model adapter-t-deit-3x
  vitadapter-zoo predict photos/ --model adapter-s-deit-3x --out overlays --score 0.5
  vitadapter-zoo predict clip.mp4 --model adapter-t-deit-3x --stride 5 --json
  vitadapter-zoo predict '*.jpg' --model my-model/ --coco-json results.json
""",
)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option(
    "--model",
    "name",
    required=True,
    shell_complete=model_names,
    metavar="NAME|FOLDER",
    help="Load name (see `list`), a saved model's folder, or user/repo on the Hub.",
)
@click.option(
    "--checkpoint",
    metavar="SOURCE",
    help="A file, a URL or hf://user/repo[@revision][/file] instead of the published one.",
)
@click.option(
    "--out",
    default="predictions",
    show_default=True,
    metavar="DIR",
    help="Folder for the pictures and videos with the detections drawn on them.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON per image to stdout.")
@click.option(
    "--coco-json",
    "coco_json",
    metavar="FILE",
    help="Write COCO results. Image ids are the numbers in the file names; if a name is not a "
    "number, images are numbered from 1. Classes other than COCO's 80 are numbered from 1.",
)
@click.option(
    "--score",
    type=click.FloatRange(0, 1),
    default=0.3,
    show_default=True,
    help="Lowest score of the detections that are drawn, printed and written.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Images per forward pass.",
)
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Use every N-th frame of a video.",
    metavar="N",
)
@click.option(
    "--max-frames", type=click.IntRange(min=1), metavar="N", help="Use at most N frames of a video."
)
@click.option("--device", help="cpu, cuda, cuda:1, ...  [default: cuda if available]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default=None,
    help="Data type of the weights.  [default: as stored]",
)
@click.option("--tf32", is_flag=True, help="Compute float32 as TF32 on CUDA: faster, less exact.")
@click.option("--offline", is_flag=True, help="Never use the network.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def predict(
    sources: Sequence[str],
    name: str,
    checkpoint: str | None,
    out: str,
    as_json: bool,
    coco_json: str | None,
    score: float,
    batch_size: int,
    stride: int,
    max_frames: int | None,
    device: str | None,
    dtype: str | None,
    tf32: bool,
    offline: bool,
    quiet: bool,
) -> None:
    """Detect objects in SOURCE... and write pictures with the detections drawn on them.

    A SOURCE is a picture, a folder of pictures, a quoted pattern ('shots/**/*.jpg'), an http(s)
    URL, a video file, or the number of a camera.
    """
    # FFmpeg's messages on stderr say less than our errors.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    check_presence(name, checkpoint, offline)
    from vitadapter_zoo import settings
    from vitadapter_zoo.detections import output_files as outputs
    from vitadapter_zoo.images.sources import expand, is_video, items

    chosen = expand([_source(text) for text in sources])
    _check_inputs(chosen)
    inputs = [*chosen, *_model_files(name), *([checkpoint] if checkpoint else [])]
    results = outputs.checked(coco_json, inputs) if coco_json else None
    model = _load(name, checkpoint, device, dtype, tf32=tf32, offline=offline, quiet=quiet)
    taken = {outputs.key(results)} if results else set()
    overlays = output.Overlays(settings.expanded(out), inputs, taken)
    rows = output.CocoResults(model.categories, output.image_ids(chosen)) if results else None
    show_bar = not quiet and not (as_json and sys.stdout.isatty())
    total = 0
    with overlays, output.progress_bar(chosen, shown=show_bar) as advance:
        images = items(chosen, stride=stride, max_frames=max_frames)
        for item, found in model.stream_items(images, score, batch_size=batch_size):
            drawn = overlays.add(item, found)
            if rows is not None:
                rows.add(item, found)
            if as_json:
                click.echo(json.dumps(output.json_record(item, found, drawn)))
            elif item.video is None:
                output.print_image(item, found, drawn, score)
            total += len(found)
            advance()
    if not as_json:
        for line in overlays.videos_written():
            click.echo(line)
    if rows is not None and results is not None:  # written last, when it is complete
        outputs.write(results, json.dumps(rows.rows).encode())
    if not total and (as_json or any(is_video(source) for source in chosen)):
        click.echo(output.nothing_found(score), err=True)


def _source(text: str) -> Source:
    """Interpret an argument: a number is a camera unless a file has that name."""
    is_index = text.isdecimal() and len(text) < LONGEST_INDEX
    return int(text) if is_index and not Path(text).exists() else text


def _model_files(name: str) -> list[Path]:
    """List the files that loading reads if ``name`` is a saved model's folder."""
    from vitadapter_zoo import settings

    folder = settings.expanded(name)
    kinds = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json")
    return [path for kind in kinds for path in folder.glob(kind)] if folder.is_dir() else []


def _check_inputs(chosen: Sequence[Source]) -> None:
    """Decode the first inputs, so that a bad file is reported before a long download.

    Raises:
        ImageError: one of the first pictures or videos cannot be decoded.
    """
    from vitadapter_zoo.images import is_url, read_image
    from vitadapter_zoo.images.sources import STREAMS, is_video, items

    for source in chosen[:CHECKED]:
        if isinstance(source, int) or is_url(source) or str(source).startswith(STREAMS):
            continue  # a camera or URL may not give the same picture twice
        if is_video(source):
            next(items([source], max_frames=1))
        else:
            read_image(source)


def _load(
    name: str,
    checkpoint: str | None,
    device: str | None,
    dtype: str | None,
    *,
    tf32: bool,
    offline: bool,
    quiet: bool,
) -> MaskRCNN:
    """Load the detector with the options of the command line.

    Raises:
        click.UsageError: ``--tf32`` without float32 weights on a GPU.
        ZooError: the device cannot be used or cannot compute float16, or loading fails.
    """
    import torch

    from vitadapter_zoo.loader import load

    place = usable_device(device or default_device())
    if dtype == "float16" and place.type == "cpu":
        raise ZooError("float16 needs a GPU; take --dtype bfloat16 on the CPU")
    model = load(
        name,
        checkpoint=checkpoint,
        device=place,
        dtype=getattr(torch, dtype) if dtype else None,
        offline=offline or None,
        progress=not quiet,
    )
    weights = next(model.parameters())
    if tf32 and (place.type != "cuda" or weights.dtype != torch.float32):
        raise click.UsageError("--tf32 needs --device cuda and --dtype float32")
    model.allow_tf32 = tf32
    return model
