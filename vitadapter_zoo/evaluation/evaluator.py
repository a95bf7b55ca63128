"""Evaluation of images in one process: decoding, network and mask encoding run in parallel."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import nn

from vitadapter_zoo.detections import Detections, Instances
from vitadapter_zoo.detections.records import xywh
from vitadapter_zoo.errors import ImageError
from vitadapter_zoo.evaluation.dataset import Image
from vitadapter_zoo.evaluation.ids import Id
from vitadapter_zoo.evaluation.run import ImageResult
from vitadapter_zoo.images import NetworkInput, stored_pixels
from vitadapter_zoo.models import MaskRCNN
from vitadapter_zoo.ops.masks import paste_rle
from vitadapter_zoo.text import shown

DECODERS = 4  # threads that feed a GPU
MOST_WAITING = 4  # batches of images of different sizes in memory
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

    @torch.inference_mode()
    def detect_together(
        self, batch: list[Prepared], batch_size: int
    ) -> Sequence[Instances | Detections]:
        """Run the network on images of one padded size.

        A short batch is filled with copies of its last image. The kernels that a device chooses,
        and with them the last bits, depend on the size of the batch; so every batch has one size.
        """
        if batch_size == 1:
            return [self.detect(prepared) for prepared in batch]
        filled = [*batch, *batch[-1:] * (batch_size - len(batch))]
        return self.model.detect([prepared.input for prepared in filled])[: len(batch)]

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
    evaluator: Evaluator,
    tasks: Iterator[Task],
    keep: Callable[[ImageResult], None],
    *,
    batch_size: int = 1,
    decoders: int = 1,
) -> None:
    """Evaluate images; the network runs in this thread, decoding and encoding in others.

    Args:
        evaluator: the detector.
        tasks: the images; other threads take them, a few images ahead.
        keep: called with each result, in another thread; in order if ``batch_size`` is 1 and there
            is one decoder.
        batch_size: images of one padded size that the network computes together.
        decoders: threads that decode.
    """
    with (
        ThreadPoolExecutor(decoders, "decode") as decoder,
        ThreadPoolExecutor(1, "encode") as encoder,
    ):
        ended = threading.Event()
        one_at_a_time = threading.Lock()

        def next_prepared() -> Prepared | ImageResult | None:
            with one_at_a_time:
                task = None if ended.is_set() else next(tasks, None)
            return None if task is None else evaluator.prepare(task)

        def finish(prepared: Prepared, found: Instances | Detections) -> None:
            keep(evaluator.finish(prepared, found))

        def compute(batch: list[Prepared]) -> None:
            found = evaluator.detect_together(batch, batch_size)
            going.extend(encoder.submit(finish, *pair) for pair in zip(batch, found, strict=True))
            while len(going) > AHEAD * batch_size:
                going.popleft().result()

        coming = deque(decoder.submit(next_prepared) for _ in range(AHEAD * decoders))
        going: deque[Future[None]] = deque()
        batches = Batches(batch_size)
        try:
            while coming:
                prepared = coming.popleft().result()
                if prepared is None:  # another thread may have taken the last image
                    continue
                coming.append(decoder.submit(next_prepared))
                if isinstance(prepared, ImageResult):
                    going.append(encoder.submit(keep, prepared))
                    continue
                for batch in batches.add(prepared):
                    compute(batch)
            for batch in batches.rest():
                compute(batch)
        finally:
            ended.set()
        for future in going:
            future.result()


class Batches:
    """Images that wait for others of their padded size."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._waiting: dict[tuple[int, ...], list[Prepared]] = {}

    def add(self, prepared: Prepared) -> Iterator[list[Prepared]]:
        """Add an image; yield the batch that is full, or the oldest if too many images wait."""
        shape = tuple(prepared.input.tensor.shape)
        batch = self._waiting.setdefault(shape, [])
        batch.append(prepared)
        if len(batch) == self._batch_size:
            yield self._waiting.pop(shape)
        elif sum(map(len, self._waiting.values())) >= MOST_WAITING * self._batch_size:
            yield self._waiting.pop(next(iter(self._waiting)))

    def rest(self) -> Iterator[list[Prepared]]:
        """Yield the batches that are not full."""
        yield from self._waiting.values()


def until(deadline: float | None, images: Iterator[Image]) -> Iterator[Task]:
    """Read images until a deadline (of ``time.monotonic``); all of them if it is None."""
    for image in images:
        if deadline is not None and time.monotonic() > deadline:
            return
        yield read(image)
