"""Evaluation of images in one process: decoding, network and mask encoding run in parallel."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import nn

from vitadapter_zoo.detections import Detections, Instances
from vitadapter_zoo.detections.detections import xywh
from vitadapter_zoo.errors import ImageError
from vitadapter_zoo.evaluation.dataset import Image
from vitadapter_zoo.evaluation.ids import Id
from vitadapter_zoo.evaluation.run import ImageResult
from vitadapter_zoo.images import NetworkInput, stored_pixels
from vitadapter_zoo.models import MaskRCNN
from vitadapter_zoo.ops.masks import paste_rle
from vitadapter_zoo.text import shown

AHEAD = 2  # images that are decoded ahead of the network, and images that wait for encoding


@dataclass(frozen=True)
class Task:
    """An image with the bytes of its file, or the reason why the file cannot be read."""

    image: Image
    encoded: bytes
    unreadable: str = ""


@dataclass(frozen=True)
class Prepared:
    """An image ready for the network."""

    image: Image
    sha256: str
    input: NetworkInput


@dataclass(frozen=True)
class Evaluator:
    """A detector with the category ids that its classes have in the data set.

    Attributes:
        model: in evaluation mode.
        category_ids: of each class, in the model's order.
        ignore_exif: whether images are decoded without the rotation of their EXIF data.
    """

    model: MaskRCNN
    category_ids: tuple[Id, ...]
    ignore_exif: bool = field(default=False, kw_only=True)

    def prepare(self, task: Task) -> Prepared | ImageResult:
        """Decode an image; if that fails, return a result that says why the image is left out."""
        image = task.image
        digest = hashlib.sha256(task.encoded).hexdigest()
        try:
            if task.unreadable:
                raise ImageError(task.unreadable)
            pixels = stored_pixels(task.encoded) if self.ignore_exif else task.encoded
            prepared = self.model.preprocess(pixels)
            if prepared.original != image.size:
                raise ImageError(_other_size(task.encoded, prepared.original, image.size))
        except ImageError as error:
            reason = f"{shown(image.path, 300)}: {error}"
            return ImageResult(image.image_id, image.size, image_sha256=digest, skipped=reason)
        return Prepared(image, digest, prepared)

    @torch.inference_mode()
    def detect(self, prepared: Prepared) -> Instances | Detections:
        """Run the network."""
        return self.model.detect([prepared.input])[0]

    def finish(self, prepared: Prepared, found: Instances | Detections) -> ImageResult:
        """Encode detections as COCO results."""
        if isinstance(found, Detections):
            masks = found.run_lengths()
        else:
            masks = paste_rle(found.mask_probabilities, found.boxes, found.size)
        return ImageResult(
            image_id=prepared.image.image_id,
            size=prepared.image.size,
            boxes=xywh(found.boxes),
            scores=found.scores.tolist(),
            category_ids=[self.category_ids[label] for label in found.labels.tolist()],
            masks=masks,
            image_sha256=prepared.sha256,
        )


def _other_size(encoded: bytes, found: tuple[int, int], annotated: tuple[int, int]) -> str:
    """Why an image's (height, width) is not the annotated one."""
    sizes = (
        f"it has {found[1]} x {found[0]} pixels, the annotations say "
        f"{annotated[1]} x {annotated[0]}"
    )
    if stored_pixels(encoded).shape[:2] == annotated:
        return (
            f"{sizes}: its EXIF data rotate it, and it was annotated as it is stored, without the "
            "rotation; --ignore-exif (read_dataset(..., ignore_exif=True)) reads it that way"
        )
    if found[::-1] == annotated:
        return (
            f"{sizes}: height and width are exchanged, because it was rotated after it was "
            "annotated or the annotation file has the two sides the wrong way round"
        )
    return f"{sizes}: it belongs to another data set"


@dataclass(frozen=True)
class MmdetEvaluator(Evaluator):
    """The same detector inside mmdet, through mmdet's own test pipeline.

    Attributes:
        peer: the mmdet detector, from ``vitadapter_zoo.backends.mmdet.from_native(model)``.
    """

    peer: nn.Module

    def detect(self, prepared: Prepared) -> Detections:
        """Run mmdet's own pipeline, from the image file to masks of the image's size."""
        from vitadapter_zoo.backends.mmdet import detect

        return detect(self.peer, prepared.image.path)


def read(image: Image) -> Task:
    """The image with its file's bytes."""
    try:
        return Task(image, image.path.read_bytes())
    except OSError as error:
        return Task(image, b"", f"the file cannot be read: {error.strerror}")


def stream(
    evaluator: Evaluator, tasks: Iterator[Task], keep: Callable[[ImageResult], None]
) -> None:
    """Evaluate images; the network runs in this thread, decoding and encoding in two others.

    Args:
        evaluator: the detector.
        tasks: the images; another thread takes them, two images ahead.
        keep: called with each result, in another thread, in order.
    """
    with ThreadPoolExecutor(1, "decode") as decoder, ThreadPoolExecutor(1, "encode") as encoder:
        ended = threading.Event()

        def next_prepared() -> Prepared | ImageResult | None:
            task = None if ended.is_set() else next(tasks, None)
            return None if task is None else evaluator.prepare(task)

        def finish(prepared: Prepared, found: Instances | Detections) -> None:
            keep(evaluator.finish(prepared, found))

        coming = deque(decoder.submit(next_prepared) for _ in range(AHEAD))
        going: deque[Future[None]] = deque()
        try:
            while (prepared := coming.popleft().result()) is not None:
                coming.append(decoder.submit(next_prepared))
                if isinstance(prepared, ImageResult):
                    going.append(encoder.submit(keep, prepared))
                else:
                    going.append(encoder.submit(finish, prepared, evaluator.detect(prepared)))
                while len(going) > AHEAD:
                    going.popleft().result()
        finally:
            ended.set()
        for future in going:
            future.result()


def until(deadline: float | None, images: Iterator[Image]) -> Iterator[Task]:
    """Read images until a deadline (of ``time.monotonic``); all of them if it is None."""
    for image in images:
        if deadline is not None and time.monotonic() > deadline:
            return
        yield read(image)
