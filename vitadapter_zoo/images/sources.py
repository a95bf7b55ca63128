"""Where images come from: single ones, folders, patterns, URLs, videos and cameras."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import cv2
import numpy as np

from vitadapter_zoo import settings
from vitadapter_zoo.errors import ImageError
from vitadapter_zoo.images import RGB, ImageInput, NetworkInput, is_url
from vitadapter_zoo.text import PATH, quoted, shown

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
STREAMS = ("rtsp://", "rtmp://")

# A camera is given by its index.
Source: TypeAlias = ImageInput | int


@dataclass(frozen=True)
class Video:
    """A video file, a network stream or a camera.

    Attributes:
        source: path, URL or camera index.
        shown_per_second: how many of the frames that are given belong to a second, so that a copy
            of them runs at the same speed; 0 if the source does not say.
    """

    source: str | int
    shown_per_second: float


@dataclass(frozen=True)
class Item:
    """One image of a source.

    Attributes:
        image: as it was given, or a decoded frame (uint8 RGB ``[H, W, 3]``).
        name: path, URL, or what it is; for messages.
        video: that it is a frame of, or None.
        frame: its number in the video, from 0.
    """

    image: ImageInput
    name: str
    video: Video | None = None
    frame: int | None = None


def expand(source: Source | Iterable[Source]) -> list[Source]:
    """Replace folders and patterns by their pictures.

    Args:
        source: an image in any of the forms of `read_image`, a folder (its pictures, in the order
            of their names), a pattern like ``"shots/**/*.jpg"``, a video file, a camera's index;
            or a list, a tuple or an iterator of those.

    Raises:
        ImageError: a folder without pictures, or a pattern that nothing fits.
    """
    return list(expand_lazily(source))


def expand_lazily(source: Source | Iterable[Source]) -> Iterator[Source]:
    """Expand sources lazily: an iterator is read only as far as requested."""
    is_file = hasattr(source, "read")  # which would be iterated over by lines
    if isinstance(source, (list, tuple, Iterator)) and not is_file:
        for given in source:
            yield from _expand_one(given)
    else:
        yield from _expand_one(cast("Source", source))


def _expand_one(source: Source) -> list[Source]:
    if not isinstance(source, (str, os.PathLike)) or is_url(source):
        return [source]
    if isinstance(source, str) and source.startswith(STREAMS):
        return [source]
    path = settings.expanded(source)
    if path.is_dir():
        found = sorted(
            entry
            for entry in path.iterdir()
            if entry.suffix.lower() in PICTURES and not entry.name.startswith(".")
        )
        if not found:
            raise ImageError(
                f"the folder {shown(path, PATH)} has no pictures ({', '.join(PICTURES)})"
            )
        return [*found]
    if glob.has_magic(str(path)) and not path.exists():
        # Path.glob takes no absolute pattern.
        matches = sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207
        files = [match for match in matches if match.is_file()]
        if not files:
            raise ImageError(f"no file fits the pattern {quoted(source, PATH)}")
        return [*files]
    return [source]


def is_video(source: Any) -> bool:
    """Return whether it is a camera's index, a network stream, or named like a video file."""
    if isinstance(source, (int, np.integer)) and not isinstance(source, bool):
        return True
    if not isinstance(source, (str, os.PathLike)):
        return False
    text = os.fspath(source)
    path = text.split("?", 1)[0] if is_url(text) else text
    return text.startswith(STREAMS) or path.lower().endswith(VIDEOS)


def items(
    sources: Iterable[Source], *, stride: int = 1, max_frames: int | None = None
) -> Iterator[Item]:
    """Yield the images in order; only one frame of a video is in memory at a time.

    Args:
        sources: from `expand` or `expand_lazily`.
        stride: of a video every stride-th frame, from the first.
        max_frames: of each video at most as many.

    Raises:
        ImageError: a video that cannot be opened or has no frames.
        ValueError: ``stride`` or ``max_frames`` below 1.
    """
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames must be at least 1, got {max_frames}")
    return _items(sources, stride, max_frames)


def _items(sources: Iterable[Source], stride: int, max_frames: int | None) -> Iterator[Item]:
    for number, source in enumerate(sources):
        if isinstance(source, (int, np.integer)) and not isinstance(source, bool):
            yield from _frames(int(source), stride, max_frames)
        elif is_video(source) and isinstance(source, (str, os.PathLike)):
            yield from _frames(os.fspath(source), stride, max_frames)
        elif isinstance(source, (str, os.PathLike)):
            yield Item(source, os.fspath(source))
        else:
            yield Item(cast("ImageInput", source), f"image {number}")


def _frames(source: str | int, stride: int, max_frames: int | None) -> Iterator[Item]:
    name = f"camera {source}" if isinstance(source, int) else shown(source, PATH)
    capture = _open(source, name)
    try:
        # NaN, negative and absurd values are what damaged headers announce.
        rate = capture.get(cv2.CAP_PROP_FPS)
        video = Video(source, rate / stride if 0 < rate < 1000 else 0.0)
        given = frame = 0
        while (max_frames is None or given < max_frames) and capture.grab():
            if frame % stride == 0:
                decoded, bgr = capture.retrieve()
                if not decoded:
                    break
                rgb: RGB = np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)
                yield Item(rgb, f"{name}, frame {frame}", video, frame)
                given += 1
            frame += 1
        if not given:
            raise ImageError(f"{name} has no frame that can be decoded")
    finally:
        capture.release()


def _open(source: str | int, name: str) -> cv2.VideoCapture:
    if isinstance(source, str) and not is_url(source) and not source.startswith(STREAMS):
        path = settings.expanded(source)
        if not path.is_file():
            raise ImageError(f"cannot read the video {name}: no such file")
        source = str(path)
    logging: Any = cv2.utils.logging
    before = logging.setLogLevel(logging.LOG_LEVEL_SILENT)  # the error below says it
    try:
        capture = cv2.VideoCapture(source)
    finally:
        logging.setLogLevel(before)
    if not capture.isOpened():
        reason = "there is none" if name.startswith("camera") else "OpenCV cannot decode it"
        raise ImageError(f"cannot open {name}: {reason}")
    return capture


def batches(
    prepared: Iterator[tuple[Item, NetworkInput]], batch_size: int
) -> Iterator[list[tuple[Item, NetworkInput]]]:
    """Group consecutive items of the same shape, at most ``batch_size`` per group."""
    batch: list[tuple[Item, NetworkInput]] = []
    for item, inputs in prepared:
        shape = inputs.tensor.shape
        if batch and (len(batch) == batch_size or shape != batch[0][1].tensor.shape):
            yield batch
            batch = []
        batch.append((item, inputs))
        if len(batch) == batch_size:  # a camera's next frame is not waited for
            yield batch
            batch = []
    if batch:
        yield batch
