"""What ``predict`` writes and prints: pictures, videos, COCO results, JSON lines, progress."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vitadapter_zoo.catalog import COCO_CLASSES
from vitadapter_zoo.text import PATH, shown

if TYPE_CHECKING:
    from vitadapter_zoo.detections import Detections
    from vitadapter_zoo.images.sources import Item, Source, Video
    from vitadapter_zoo.images.videos import VideoFile


@dataclass
class Overlays:
    """The drawn pictures and videos: one per input; an input file is never overwritten.

    Attributes:
        folder: the output folder.
        inputs: the files that the command reads.
        taken: keys of the file names that are already used, see `output_files.key`.
    """

    folder: Path
    inputs: Sequence[Any]
    taken: set[str] = field(default_factory=set)
    _video: VideoFile | None = None
    _source: Video | None = None
    _finished: list[VideoFile] = field(default_factory=list)

    def add(self, item: Item, found: Detections) -> Path:
        """Draw the detections of one image; return the path of the picture or video."""
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
        """Yield a summary line for each finished video."""
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
        # Ctrl-C is how a camera is stopped, so its video is complete. After an error it is not.
        if kind is None or issubclass(kind, KeyboardInterrupt):
            self._finish()
        elif self._video is not None:
            self._video.discard()


@dataclass
class CocoResults:
    """The detections of all images as COCO results.

    Attributes:
        categories: the model's classes.
        ids: image ids in input order; None numbers the images from 1.
        rows: one dictionary per detection.
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


def image_ids(chosen: Sequence[Source]) -> list[int] | None:
    """Return the numbers in the file names, as in COCO, or None if a name is not a number."""
    stems = [
        Path(source).stem if isinstance(source, (str, os.PathLike)) else "" for source in chosen
    ]
    if not all(stem.isascii() and stem.isdecimal() for stem in stems):
        return None
    ids = [int(stem) for stem in stems]
    return ids if len(set(ids)) == len(ids) else None


def json_record(item: Item, found: Detections, drawn: Path) -> dict[str, Any]:
    """Build the ``--json`` line of one image."""
    frame = {} if item.frame is None else {"frame": item.frame}
    name = item.name if item.video is None else str(item.video.source)
    return {
        "image": name,
        **frame,
        "overlay": str(drawn),
        "size": list(found.size),
        "detections": found.to_records(),
    }


def print_image(item: Item, found: Detections, drawn: Path, score: float) -> None:
    """Print the detections of one image, a line per class."""
    name, target = shown(item.name, PATH), shown(drawn, PATH)
    if not len(found):
        click.echo(f"{name}: {nothing_found(score)}")
        return
    noun = "detection" if len(found) == 1 else "detections"
    click.echo(f"{name}: {len(found)} {noun}, drawn in {target}")
    for line in _by_class(found):
        click.echo(f"  {line}")


def nothing_found(score: float) -> str:
    """Return the message for images without detections."""
    return f"no detection scored {score:g} or more; a lower --score shows what scored less"


def _by_class(detections: Detections) -> list[str]:
    """Return a line per class with its count and best score, best class first."""
    scores: dict[str, list[float]] = {}
    for name, score in zip(detections.class_names, detections.scores.tolist(), strict=True):
        scores.setdefault(name, []).append(score)
    return [
        f"{len(found):4d} {shown(name)} (best score {found[0]:.2f})"
        for name, found in scores.items()
    ]


@contextlib.contextmanager
def progress_bar(chosen: Sequence[Source], *, shown: bool) -> Iterator[Callable[[], None]]:
    """Show a progress bar if stderr is a terminal; yield a function to call after each image."""
    if not (shown and sys.stderr.isatty()):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from vitadapter_zoo.images.sources import is_video

    progress = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        # rich must not redirect lines that go to a pipe.
        redirect_stdout=sys.stdout.isatty(),
    )
    # The number of frames is known only after a video is opened.
    total = None if any(is_video(source) for source in chosen) else len(chosen)
    task = progress.add_task("images", total=total)
    with progress:
        yield lambda: progress.advance(task)
