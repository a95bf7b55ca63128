"""Write a video frame by frame; the file gets its name when it is complete."""

import os
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.text import shown

FRAMES_PER_SECOND = 25.0  # if the source does not say
CODEC = "mp4v"  # MPEG-4 part 2, which every build of OpenCV encodes


class VideoFile:
    """An MP4 file that is being written.

    Args:
        target: the output file; an existing file is replaced.
        name: what it shows, for messages.
        frames_per_second: 0 if unknown.
    """

    def __init__(self, target: Path, name: str, frames_per_second: float) -> None:
        self.target = target
        self.name = name
        self.frames = 0
        self.frames_with_objects = 0
        self.objects = 0
        self._rate = frames_per_second or FRAMES_PER_SECOND
        # OpenCV chooses the format by the ending.
        self._partial = target.with_name(f".{target.stem}.{os.getpid()}.part.mp4")
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)

    def write(self, frame: Image.Image, objects: int) -> None:
        """Append a frame, and count its detections.

        Raises:
            ZooError: the file cannot be written, or the frame has another size than the first.
        """
        if self._writer is None:
            self._open(frame.size)
        if frame.size != self._size:
            raise ZooError(f"the frames of {self.name} change their size: split the video there")
        assert self._writer is not None  # noqa: S101  opened above
        self._writer.write(cv2.cvtColor(np.asarray(frame), cv2.COLOR_RGB2BGR))
        self.frames += 1
        self.objects += objects
        self.frames_with_objects += objects > 0

    def finish(self) -> None:
        """Finish the file and move it to its name.

        Raises:
            ZooError: the file cannot be written.
        """
        if self._writer is None:
            return
        self._writer.release()
        self._writer = None
        try:
            if not self._partial.stat().st_size:
                raise OSError("nothing was written")
            self._partial.replace(self.target)
        except OSError as error:
            self.discard()
            raise ZooError(
                f"cannot write {shown(self.target)}: {error.strerror or error}; choose "
                "another place"
            ) from error

    def discard(self) -> None:
        """Remove the incomplete file."""
        if self._writer is not None:
            self._writer.release()
            self._writer = None
        self._partial.unlink(missing_ok=True)

    def _open(self, size: tuple[int, int]) -> None:
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._partial.touch()
        except OSError as error:
            raise ZooError(
                f"cannot write {shown(self.target)}: {error.strerror or error}; choose "
                "another place"
            ) from error
        code = cv2.VideoWriter.fourcc(*CODEC)
        self._writer = cv2.VideoWriter(str(self._partial), code, self._rate, size)
        self._size = size
        if not self._writer.isOpened():
            self.discard()
            raise ZooError(
                f"cannot write {shown(self.target)}: this OpenCV encodes no {CODEC} video"
            )
