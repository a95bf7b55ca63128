"""Transforms of training images and their objects: sizes, crops, flips and masks.

The order and the ranges are the original's: flip, then one of two branches (a random size; or a
size, a crop and a size), then a crop to 1024 x 1024.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from vitadapter_zoo.images import RGB, resized_size
from vitadapter_zoo.training.recipe import Augment

Masks = npt.NDArray[np.uint8]

# For a short side of 800; other input sizes scale them.
SHORT_SIDES = tuple(range(480, 801, 32))
SHORT_SIDES_BEFORE_CROP = (400, 500, 600)
CROP_RANGE = (384, 600)
LARGEST_CROP = 1024
PUBLISHED_SHORT_SIDE = 800


@dataclass(frozen=True)
class Objects:
    """The objects of one image.

    Attributes:
        boxes: float32 ``[n, 4]`` as (x1, y1, x2, y2) in the image's pixels.
        labels: int64 ``[n]``, index of the class.
        masks: uint8 ``[n, H, W]`` of zeros and ones, the image's size.
    """

    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    masks: Masks


@dataclass(frozen=True)
class Sizes:
    """What the augmentation draws from, in network pixels.

    Attributes:
        longest: no resized image has a longer side.
        short_sides: of the resized image, each equally likely.
        before_crop: short sides of the crop branch; empty without that branch.
        crop: smallest and largest side of the crop.
        largest: side of the last crop; None without.
        flip: how often images are mirrored, 0..1.
    """

    longest: int
    short_sides: tuple[int, ...]
    before_crop: tuple[int, ...] = ()
    crop: tuple[int, int] = (0, 0)
    largest: int | None = None
    flip: float = 0.5


def sizes(augment: Augment, input_size: tuple[int, int]) -> Sizes:
    """The published ranges for an input size of (longest, shortest) side."""
    longest, shortest = input_size
    if augment != "multi-scale":
        return Sizes(longest, (shortest,), flip=0.0 if augment == "none" else 0.5)

    def scaled(side: int) -> int:
        return max(1, round(side * shortest / PUBLISHED_SHORT_SIDE))

    return Sizes(
        longest,
        tuple(scaled(side) for side in SHORT_SIDES),
        tuple(scaled(side) for side in SHORT_SIDES_BEFORE_CROP),
        (scaled(CROP_RANGE[0]), scaled(CROP_RANGE[1])),
        scaled(LARGEST_CROP),
    )


def augmented(
    image: RGB, objects: Objects, sizes: Sizes, generator: np.random.Generator
) -> tuple[RGB, Objects]:
    """One random view of an image with its objects; those outside of it are dropped.

    Args:
        image: uint8 RGB ``[H, W, 3]``.
        objects: of the image.
        sizes: what is drawn from.
        generator: draws.
    """
    if sizes.flip and generator.random() < sizes.flip:
        image, objects = flipped(image, objects)
    if sizes.before_crop and generator.random() < 0.5:
        image, objects = resized(image, objects, sizes.longest, _pick(sizes.before_crop, generator))
        image, objects = cropped(image, objects, sizes.crop, generator)
    image, objects = resized(image, objects, sizes.longest, _pick(sizes.short_sides, generator))
    if sizes.largest is not None:
        image, objects = cropped(image, objects, (sizes.largest, sizes.largest), generator)
    return image, objects


def flipped(image: RGB, objects: Objects) -> tuple[RGB, Objects]:
    """Mirrored left to right."""
    x1, y1, x2, y2 = objects.boxes.T
    width = image.shape[1]
    boxes = np.stack([width - x2, y1, width - x1, y2], axis=1)
    return image[:, ::-1], replace(objects, boxes=boxes, masks=objects.masks[:, :, ::-1])


def resized(image: RGB, objects: Objects, longest: int, shortest: int) -> tuple[RGB, Objects]:
    """Resized with the aspect ratio kept; images bilinear, masks to the nearest pixel."""
    height, width = image.shape[:2]
    new_height, new_width = (
        max(1, side) for side in resized_size(height, width, (longest, shortest))
    )
    if (new_height, new_width) == (height, width):
        return image, objects
    scale = np.array([new_width / width, new_height / height] * 2, np.float32)
    limit = np.array([new_width, new_height] * 2, np.float32)
    masks = np.empty((len(objects.masks), new_height, new_width), np.uint8)
    for source, target in zip(objects.masks, masks, strict=True):
        target[:] = _resize(source, (new_width, new_height), cv2.INTER_NEAREST)
    boxes = np.clip(objects.boxes * scale, 0, limit)
    smaller = _resize(image, (new_width, new_height), cv2.INTER_LINEAR)
    return smaller, replace(objects, boxes=boxes, masks=masks)


def cropped(
    image: RGB, objects: Objects, sides: tuple[int, int], generator: np.random.Generator
) -> tuple[RGB, Objects]:
    """A random rectangle whose sides lie between ``sides``, or are the image's where it is smaller.

    It may hold no object at all, as in the original.
    """
    height, width = image.shape[:2]
    smallest, largest = sides
    if max(height, width) <= smallest:
        return image, objects
    crop_height, crop_width = (
        int(generator.integers(min(side, smallest), min(side, largest), endpoint=True))
        for side in (height, width)
    )
    top = int(generator.integers(0, height - crop_height, endpoint=True))
    left = int(generator.integers(0, width - crop_width, endpoint=True))
    shift = np.array([left, top] * 2, np.float32)
    limit = np.array([crop_width, crop_height] * 2, np.float32)
    boxes = np.clip(objects.boxes - shift, 0, limit)
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    rows, columns = slice(top, top + crop_height), slice(left, left + crop_width)
    return image[rows, columns], Objects(
        boxes[kept], objects.labels[kept], objects.masks[kept][:, rows, columns]
    )


def _resize(image: Any, size: tuple[int, int], interpolation: int) -> Any:
    return cv2.resize(np.ascontiguousarray(image), size, interpolation=interpolation)


def _pick(values: tuple[int, ...], generator: np.random.Generator) -> int:
    return values[0] if len(values) == 1 else values[int(generator.integers(len(values)))]
