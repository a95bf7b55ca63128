"""Batches of random views: what the data loader's processes make and the network takes.

Every view is a function of (seed, epoch, image), and every batch of (seed, step): a run can be
continued at any step without any state of the loader.
"""

from __future__ import annotations

import pickle
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vitadapter_zoo.errors import DatasetError, ZooError
from vitadapter_zoo.images import RGB, NetworkInput, padded_side, read_image
from vitadapter_zoo.training.annotations import Sample
from vitadapter_zoo.training.masks import rasterised
from vitadapter_zoo.training.transforms import Objects, Sizes, augmented

Key = tuple[int, int]  # epoch, place of the sample
View = tuple[RGB, Objects]
ViewOrError = View | ZooError  # errors travel as they are: torch's own way adds a traceback


class Views(Dataset[ViewOrError]):
    """Random views of the training images.

    Args:
        samples: images with their objects.
        sizes: what the views are drawn from.
        seed: of the run.
    """

    def __init__(self, samples: Sequence[Sample], sizes: Sizes, seed: int) -> None:
        # One block of bytes is shared by forked processes; a million objects would be copied to
        # each of them as soon as they are counted.
        encoded = [pickle.dumps(sample, protocol=pickle.HIGHEST_PROTOCOL) for sample in samples]
        self._ends = np.cumsum([len(part) for part in encoded])
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._sizes = sizes
        self._seed = seed

    def __len__(self) -> int:
        return len(self._ends)

    def sample(self, place: int) -> Sample:
        """The image of that place with its objects."""
        start = self._ends[place - 1] if place else 0
        # The bytes are those that the constructor made.
        return pickle.loads(self._bytes[start : self._ends[place]].tobytes())  # noqa: S301

    def __getitem__(self, key: Key) -> ViewOrError:
        try:
            return self._view(*key)
        except ZooError as error:
            return error

    def _view(self, epoch: int, place: int) -> View:
        sample = self.sample(place)
        image = read_image(Path(sample.path))
        if sample.size is not None and image.shape[:2] != sample.size:
            raise DatasetError(
                f"{sample.path} has changed since the run began: it has {image.shape[1]} x "
                f"{image.shape[0]} pixels now; restore the file"
            )
        height, width = image.shape[:2]
        instances = sample.instances
        boxes = np.array([one.box for one in instances], np.float32).reshape(-1, 4)
        labels = np.array([one.label for one in instances], np.int64)
        objects = Objects(boxes, labels, rasterised(instances, height, width))
        generator = np.random.default_rng((self._seed, epoch, place))
        return augmented(image, objects, self._sizes, generator)


class Batches(Sampler[list[Key]]):
    """The batches of one process, epoch after epoch, from any step on.

    Images are put together by orientation, as the original does, so that little is padded. The
    last batch of an epoch is filled up with images of the same epoch.

    Args:
        wide: of each image, whether it is wider than high.
        batch_size: images for each process and forward pass.
        epochs: how many.
        seed: of the run.
        start: forward passes that are done already.
        process: index of this process.
        processes: how many there are.
    """

    def __init__(
        self,
        wide: Sequence[bool],
        batch_size: int,
        epochs: int,
        seed: int,
        start: int = 0,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self._wide = np.array(wide, bool)
        self._size = batch_size * processes
        self._epochs = epochs
        self._seed = seed
        self._start = start
        self._mine = slice(process * batch_size, (process + 1) * batch_size)
        counts = (int(self._wide.sum()), int((~self._wide).sum()))
        whole = sum(count // self._size for count in counts)
        rest = sum(count % self._size for count in counts)
        self.per_epoch = whole + -(-rest // self._size)

    def __len__(self) -> int:
        return self.per_epoch * self._epochs - self._start

    def __iter__(self) -> Iterator[list[Key]]:
        first, skipped = divmod(self._start, self.per_epoch)
        for epoch in range(first, self._epochs):
            for batch in self._epoch(epoch)[skipped:]:
                yield [(epoch, int(place)) for place in batch[self._mine]]
            skipped = 0

    def _epoch(self, epoch: int) -> list[list[int]]:
        generator = np.random.default_rng((self._seed, epoch))
        order = generator.permutation(len(self._wide))
        batches: list[list[int]] = []
        rest: list[int] = []
        for wide in (True, False):
            group = [int(place) for place in order if self._wide[place] == wide]
            whole = len(group) - len(group) % self._size
            batches += [group[at : at + self._size] for at in range(0, whole, self._size)]
            rest += group[whole:]
        missing = -len(rest) % self._size
        rest += [int(place) for place in np.resize(order, missing)]
        batches += [rest[at : at + self._size] for at in range(0, len(rest), self._size)]
        return [batches[place] for place in generator.permutation(len(batches))]


@dataclass(frozen=True)
class Batch:
    """Views of one forward pass, padded to one size; four tensors, however many the objects.

    Attributes:
        images: uint8 RGB ``[B, 3, H, W]``, zero-padded at the bottom and right.
        boxes: float32 ``[N, 4]`` as (x1, y1, x2, y2) in network pixels, image after image.
        labels: int64 ``[N]``.
        masks: bool ``[N, H, W]``.
        counts: objects of each image.
        sizes: (height, width) of each image without the padding.
    """

    images: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor
    counts: list[int]
    sizes: list[tuple[int, int]]

    def pin_memory(self) -> Batch:
        """In memory from which a GPU copies without waiting."""
        return replace(
            self,
            images=self.images.pin_memory(),
            boxes=self.boxes.pin_memory(),
            labels=self.labels.pin_memory(),
            masks=self.masks.pin_memory(),
        )

    def to(self, device: torch.device) -> Batch:
        """With images and masks on a device, copied beside the computing from pinned memory.

        Boxes and labels stay: ``losses`` checks them, which would make it wait for the device.
        """
        images, masks = (x.to(device, non_blocking=True) for x in (self.images, self.masks))
        return replace(self, images=images, masks=masks)


def collate(found: Sequence[ViewOrError]) -> Batch | ZooError:
    """Views to one batch; the first error where there is one."""
    views: list[View] = []
    for view in found:
        if isinstance(view, ZooError):
            return view
        views.append(view)
    height, width = (padded_side(max(image.shape[side] for image, _ in views)) for side in (0, 1))
    counts = [len(objects.labels) for _, objects in views]
    images = torch.zeros(len(views), 3, height, width, dtype=torch.uint8)
    masks = torch.zeros(sum(counts), height, width, dtype=torch.bool)
    start = 0
    for index, (image, objects) in enumerate(views):
        rows, columns = image.shape[:2]
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
        images[index, :, :rows, :columns] = pixels
        drawn = torch.from_numpy(np.ascontiguousarray(objects.masks))
        masks[start : start + len(drawn), :rows, :columns] = drawn.bool()
        start += len(drawn)
    return Batch(
        images,
        torch.from_numpy(np.concatenate([objects.boxes for _, objects in views])),
        torch.from_numpy(np.concatenate([objects.labels for _, objects in views])),
        masks,
        counts,
        [image.shape[:2] for image, _ in views],
    )


def data_loader(
    views: Views, batches: Batches, workers: int, device: torch.device
) -> DataLoader[ViewOrError]:
    """The loader of a whole run: its processes go on over the epochs' ends.

    Args:
        views: of the training images.
        batches: which views, in what order.
        workers: processes; 0 makes the batches in this one.
        device: where the batches go.
    """
    return DataLoader(
        views,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=_start_worker,
        prefetch_factor=4 if workers else None,
    )


def _start_worker(_: int) -> None:
    # Ctrl-C reaches all processes of a terminal; the main one ends the others when it is ready.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def inputs_and_targets(
    batch: Batch, mean: Tensor, deviation: Tensor
) -> tuple[list[NetworkInput], list[dict[str, Tensor]]]:
    """What ``losses`` takes, normalised where the batch is.

    Args:
        batch: from ``collate``.
        mean: float32 ``[3, 1, 1]``, 0..255, on the batch's device.
        deviation: the same for the standard deviation.
    """
    images = (batch.images.float() - mean) / deviation
    height, width = images.shape[2:]
    for index, (rows, columns) in enumerate(batch.sizes):
        if (rows, columns) != (height, width):  # padding is zero after the normalisation
            images[index, :, rows:] = 0
            images[index, :, :, columns:] = 0
    inputs = [
        NetworkInput(images[index : index + 1], size, size, (1.0, 1.0, 1.0, 1.0))
        for index, size in enumerate(batch.sizes)
    ]
    parts = zip(
        batch.boxes.split(batch.counts),
        batch.labels.split(batch.counts),
        batch.masks.split(batch.counts),
        strict=True,
    )
    targets = [{"boxes": boxes, "labels": labels, "masks": masks} for boxes, labels, masks in parts]
    return inputs, targets
