"""``predict``: find objects in pictures, folders, videos and camera streams."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vitadapter_zoo.catalog import COCO_CLASSES
from vitadapter_zoo.cli.models import check_presence, model_names
from vitadapter_zoo.cli.numbers import FiniteRange
from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.text import PATH, quoted, shown

if TYPE_CHECKING:
    from vitadapter_zoo.detections import Detections
    from vitadapter_zoo.images.sources import Item, Source, Video
    from vitadapter_zoo.images.videos import VideoFile
    from vitadapter_zoo.models import MaskRCNN

LONGEST_INDEX = 6  # digits of a camera's index
CHECKED = 100  # pictures that are decoded before the model is loaded


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
    help="Folder for the pictures and videos with what was found.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print a line of JSON for each image on stdout."
)
@click.option(
    "--coco-json",
    "coco_json",
    metavar="FILE",
    help="Write COCO results. An image's id is the number that is its file's name; where a name is "
    "no number, images count from 1. Categories of other classes than COCO's count from 1.",
)
@click.option(
    "--score",
    type=FiniteRange(0, 1),
    default=0.3,
    show_default=True,
    help="Lowest score that is drawn, printed and written.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Images that the network computes together.",
)
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Of a video every N-th frame.",
    metavar="N",
)
@click.option(
    "--max-frames", type=click.IntRange(min=1), metavar="N", help="Of a video at most N frames."
)
@click.option("--device", help="cpu, cuda, cuda:1, ...  [default: cuda where there is one]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default=None,
    help="Of the weights; as they are stored by default.",
)
@click.option("--tf32", is_flag=True, help="Let float32 be TF32 on CUDA: faster, less exact.")
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
    """Detect objects in SOURCE... and write pictures with what was found.

    A SOURCE is a picture, a folder of pictures, a quoted pattern ('shots/**/*.jpg'), an http(s)
    URL, a video file, or the number of a camera.
    """
    # FFmpeg's own lines on stderr say less than our errors do.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    check_presence(name, checkpoint, offline)
    from vitadapter_zoo import settings
    from vitadapter_zoo.detections import output_files as outputs
    from vitadapter_zoo.images.sources import expand, is_video, items

    chosen = expand([_source(text) for text in sources])
    _check_inputs(chosen)
    inputs = [*chosen, *_model_files(name), *([checkpoint] if checkpoint else [])]
    results = outputs.checked(coco_json, inputs) if coco_json else None
    model = _load(name, checkpoint, device, dtype, offline, quiet)
    weights = next(model.parameters())
    if tf32 and (weights.device.type != "cuda" or str(weights.dtype) != "torch.float32"):
        raise click.UsageError("--tf32 needs --device cuda and --dtype float32")
    model.allow_tf32 = tf32
    overlays = Overlays(
        settings.expanded(out),
        inputs,
        taken={outputs.key(results)} if results else set(),
    )
    totals = Counter[str]()
    with contextlib.ExitStack() as stack:
        stack.enter_context(overlays)
        rows: CocoResults | None = None
        if results is not None:
            rows = CocoResults(model.categories, _image_ids(chosen))
        advance = stack.enter_context(
            _progress(chosen, shown=not quiet and not (as_json and sys.stdout.isatty()))
        )
        images = items(chosen, stride=stride, max_frames=max_frames)
        for item, found in model.stream_items(images, score, batch_size=batch_size):
            drawn = overlays.add(item, found)
            if rows is not None:
                rows.add(item, found)
            if as_json:
                click.echo(json.dumps(_record(item, found, drawn)))
            elif item.video is None:
                _print_image(item, found, drawn, score)
            totals[item.name if item.video is None else str(item.video.source)] += len(found)
            advance(item.video)
    if not as_json:
        for line in overlays.videos_written():
            click.echo(line)
    if rows is not None and results is not None:
        outputs.write(results, json.dumps(rows.rows).encode())
    if not sum(totals.values()) and (as_json or any(is_video(source) for source in chosen)):
        click.echo(_nothing(score), err=True)


def _source(text: str) -> Source:
    """An argument as a source: a number that is no file is a camera."""
    is_index = text.isdecimal() and len(text) < LONGEST_INDEX
    return int(text) if is_index and not Path(text).exists() else text


def _model_files(name: str) -> list[Path]:
    """The files that are read where the model's name is a folder's."""
    from vitadapter_zoo import settings

    folder = settings.expanded(name)
    kinds = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json")
    return [path for kind in kinds for path in folder.glob(kind)] if folder.is_dir() else []


def _check_inputs(chosen: Sequence[Source]) -> None:
    """Say which picture cannot be read before a long download.

    Raises:
        ImageError: one of the first pictures or videos cannot be decoded.
    """
    from vitadapter_zoo.images import is_url, read_image
    from vitadapter_zoo.images.sources import STREAMS, is_video, items

    for source in chosen[:CHECKED]:
        if isinstance(source, int) or is_url(source) or str(source).startswith(STREAMS):
            continue  # neither is read twice
        if is_video(source):
            next(items([source], max_frames=1))
        else:
            read_image(source)


def _load(
    name: str,
    checkpoint: str | None,
    device: str | None,
    dtype: str | None,
    offline: bool,
    quiet: bool,
) -> MaskRCNN:
    import torch

    from vitadapter_zoo.loader import load

    place = usable_device(device or default_device())
    if dtype == "float16" and place.type == "cpu":
        raise ZooError("float16 needs a GPU; take --dtype bfloat16 on the CPU")
    return load(
        name,
        checkpoint=checkpoint,
        device=place,
        dtype=getattr(torch, dtype) if dtype else None,
        offline=offline or None,
        progress=not quiet,
    )


def default_device() -> str:
    """``"cuda"`` where torch sees such a device, else ``"cpu"``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def usable_device(name: str) -> Any:
    """The torch device of that name.

    Raises:
        ZooError: it is not here, or no device.
    """
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = shown(str(error).splitlines()[0])
        raise ZooError(f"the device {quoted(name)} cannot be used here: {reason}") from error
    return device


@dataclass
class Overlays:
    """Pictures and videos with what was found, one for each input, none over an input.

    Attributes:
        folder: where they go.
        inputs: what the command reads.
        taken: the keys of the names that are in use, see `output_files.key`.
    """

    folder: Path
    inputs: Sequence[Any]
    taken: set[str] = field(default_factory=set)
    _video: VideoFile | None = None
    _source: Video | None = None
    _finished: list[VideoFile] = field(default_factory=list)

    def add(self, item: Item, found: Detections) -> Path:
        """Draw one image; where to."""
        from vitadapter_zoo.detections import output_files as outputs

        if item.video is None:
            self._finish()
            target = self._name(item.name, ".png")
            outputs.write_picture(target, found.draw(item.image))
            return target
        if item.video is not self._source:
            self._finish()
            self._source, self._video = item.video, self._begin(item.video)
        assert self._video is not None  # noqa: S101  set with _source
        self._video.write(found.draw(item.image), len(found))
        return self._video.target

    def videos_written(self) -> Iterator[str]:
        """A line for each video."""
        for video in self._finished:
            yield (
                f"{video.name}: {video.frames} frames, {video.objects} detections in "
                f"{video.frames_with_objects} of them, drawn in {shown(video.target, PATH)}"
            )

    def _begin(self, video: Video) -> VideoFile:
        from vitadapter_zoo.images.videos import VideoFile

        camera = isinstance(video.source, int)
        name = f"camera-{video.source}" if camera else str(video.source)
        return VideoFile(
            self._name(name, ".mp4"), shown(video.source, PATH), video.shown_per_second
        )

    def _name(self, image: str, suffix: str) -> Path:
        from vitadapter_zoo.detections import output_files as outputs

        stem = Path(image.partition("?")[0]).stem if "://" in image else Path(image).stem
        return outputs.free_name(self.folder / f"{stem}{suffix}", self.taken, self.inputs)

    def _finish(self) -> None:
        if self._video is not None:
            self._video.finish()
            self._finished.append(self._video)
        self._video = self._source = None

    def __enter__(self) -> Overlays:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What a camera gave until Ctrl-C is a whole video; what an error cut short is not.
        if kind is None or issubclass(kind, KeyboardInterrupt):
            self._finish()
        elif self._video is not None:
            self._video.discard()


@dataclass
class CocoResults:
    """COCO results of all images.

    Attributes:
        categories: the model's classes.
        ids: of the images, in order; None counts from 1.
        rows: one for each detection.
    """

    categories: tuple[str, ...]
    ids: list[int] | None
    rows: list[dict[str, Any]] = field(default_factory=list)
    _images: int = 0

    def add(self, item: Item, found: Detections) -> None:
        """Append the detections of the next image."""
        own = None if self.categories == COCO_CLASSES else range(1, len(self.categories) + 1)
        image_id = self.ids[self._images] if self.ids else self._images + 1
        self.rows += found.to_coco(image_id, category_ids=own)
        self._images += 1


def _image_ids(chosen: Sequence[Source]) -> list[int] | None:
    """The numbers that all file names are, as in COCO; None where one is no number."""
    stems = [
        Path(source).stem if isinstance(source, (str, os.PathLike)) else "" for source in chosen
    ]
    if not all(stem.isascii() and stem.isdecimal() for stem in stems):
        return None
    ids = [int(stem) for stem in stems]
    return ids if len(set(ids)) == len(ids) else None


def _record(item: Item, found: Detections, drawn: Path) -> dict[str, Any]:
    frame = {} if item.frame is None else {"frame": item.frame}
    name = item.name if item.video is None else str(item.video.source)
    return {
        "image": name,
        **frame,
        "overlay": str(drawn),
        "size": list(found.size),
        "detections": found.to_records(),
    }


def _print_image(item: Item, found: Detections, drawn: Path, score: float) -> None:
    name, target = shown(item.name, PATH), shown(drawn, PATH)
    if not len(found):
        click.echo(f"{name}: {_nothing(score)}")
        return
    noun = "detection" if len(found) == 1 else "detections"
    click.echo(f"{name}: {len(found)} {noun}, drawn in {target}")
    for line in _by_class(found):
        click.echo(f"  {line}")


def _nothing(score: float) -> str:
    return f"no detection scored {score:g} or more; a lower --score shows what scored less"


def _by_class(detections: Detections) -> list[str]:
    """One line per class: how many, and the best score; the best class first."""
    scores: dict[str, list[float]] = {}
    for name, score in zip(detections.class_names, detections.scores.tolist(), strict=True):
        scores.setdefault(name, []).append(score)
    return [
        f"{len(found):4d} {shown(name)} (best score {found[0]:.2f})"
        for name, found in scores.items()
    ]


@contextlib.contextmanager
def _progress(chosen: Sequence[Source], *, shown: bool) -> Iterator[Callable[[Video | None], None]]:
    """A bar on stderr where that is a terminal; yields what is called after each image."""
    if not (shown and sys.stderr.isatty()):
        yield lambda video: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from vitadapter_zoo.images.sources import is_video

    progress = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        # Lines for a pipe stay in it.
        redirect_stdout=sys.stdout.isatty(),
    )
    # The frames of a video are known once it is open.
    total = None if any(is_video(source) for source in chosen) else len(chosen)
    task = progress.add_task("images", total=total)
    with progress:
        yield lambda video: progress.advance(task)
