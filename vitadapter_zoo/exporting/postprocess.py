"""From a picture to the inputs of an exported detector, and from its outputs to detections.

``vitadapter-zoo export`` puts a copy of this file beside the exported one. It needs numpy only:

    import json, onnxruntime, postprocess
    settings = json.load(open("NAME-800x1216.json"))
    session = onnxruntime.InferenceSession("NAME-800x1216.onnx")
    prepared = postprocess.prepare(pixels, settings)         # uint8 RGB [H, W, 3]
    outputs = session.run(settings["outputs"], prepared.inputs(score_threshold=0.5))
    found = postprocess.finish(outputs, prepared, settings)  # boxes, scores, labels, masks, names
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
FIXED_POINT = 2048  # OpenCV's weights of an interpolation are integers of this unit
MASK_THRESHOLD = 0.5  # smallest probability that belongs to the object


@dataclass(frozen=True)
class Prepared:
    """A picture as the exported detector takes it.

    Attributes:
        image: float32 ``[1, 3, H, W]``, normalised RGB, zero-padded at the bottom and right.
        resized: (height, width) of the picture inside of ``image``.
        original: (height, width) of the picture.
        scale: pixels of ``image`` per pixel of the picture, (x, y, x, y).
    """

    image: Array
    resized: tuple[int, int]
    original: tuple[int, int]
    scale: tuple[float, float, float, float]

    def inputs(self, score_threshold: float = 0.05) -> dict[str, Array]:
        """The file's inputs by name; ``score_threshold`` is the lowest score kept, 0..1."""
        return {
            "image": self.image,
            "size": np.array(self.resized, np.float32),
            "score_threshold": np.array([score_threshold], np.float32),
        }


@dataclass(frozen=True)
class Found:
    """The detections in a picture, best score first.

    Attributes:
        boxes: float32 ``[N, 4]`` as (x1, y1, x2, y2) in pixels of the picture.
        scores: float32 ``[N]`` in 0..1.
        labels: int64 ``[N]``, index of the class.
        masks: bool ``[N, height, width]``.
        names: name of each detection's class.
    """

    boxes: Array
    scores: Array
    labels: Array
    masks: Array
    names: list[str]


def prepare(pixels: Array, settings: dict[str, Any]) -> Prepared:
    """Resize, normalise and pad a picture for the file that ``settings`` describe.

    The picture is made as large as fits the file's size, its aspect ratio kept.

    Args:
        pixels: uint8 RGB ``[height, width, 3]``.
        settings: content of the JSON file beside the exported one.

    Raises:
        ValueError: ``pixels`` is not such an array, or so elongated that a side would vanish.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ValueError(
            f"a picture is uint8 RGB [height, width, 3], got {pixels.dtype} {list(pixels.shape)}"
        )
    height, width = pixels.shape[:2]
    full_height, full_width = settings["height"], settings["width"]
    factor = min(full_height / height, full_width / width)
    new_height, new_width = int(height * factor + 0.5), int(width * factor + 0.5)
    if min(new_height, new_width) < 1:
        raise ValueError(f"a picture of {width} x {height} pixels is too elongated; crop it first")
    resized = resize(pixels, new_height, new_width).astype(np.float32)
    mean = np.array(settings["mean"], np.float64)
    std = np.array(settings["std"], np.float64)
    normalised = (resized - mean).astype(np.float32) * (1 / std)
    image = np.zeros((1, 3, full_height, full_width), np.float32)
    image[0, :, :new_height, :new_width] = normalised.transpose(2, 0, 1)
    x, y = float(np.float32(new_width / width)), float(np.float32(new_height / height))
    return Prepared(image, (new_height, new_width), (height, width), (x, y, x, y))


def finish(outputs: Any, prepared: Prepared, settings: dict[str, Any]) -> Found:
    """Turn the file's outputs into detections on the picture.

    Args:
        outputs: the file's outputs in the order of ``settings["outputs"]``: boxes ``[N, 4]`` in
            pixels of the input, scores ``[N]``, labels ``[N]``, mask probabilities
            ``[N, 28, 28]``.
        prepared: the inputs' origin, from `prepare`.
        settings: content of the JSON file beside the exported one.
    """
    boxes, scores, labels, probabilities = (np.asarray(output) for output in outputs)
    boxes = boxes.astype(np.float32) / np.array(prepared.scale, np.float32)
    masks = paste(probabilities.astype(np.float32), boxes, prepared.original)
    names = [settings["classes"][label] for label in labels.tolist()]
    return Found(boxes, scores.astype(np.float32), labels, masks, names)


def paste(probabilities: Array, boxes: Array, size: tuple[int, int]) -> Array:
    """Resample each mask into its box on the picture and threshold it at 0.5.

    Args:
        probabilities: float32 ``[N, M, M]`` in 0..1.
        boxes: float32 ``[N, 4]`` as (x1, y1, x2, y2) in pixels of the picture.
        size: (height, width) of the picture.

    Returns:
        bool ``[N, height, width]``.
    """
    height, width = size
    masks = np.zeros((len(boxes), height, width), bool)
    for mask, probability, (x1, y1, x2, y2) in zip(masks, probabilities, boxes, strict=True):
        left, top = (int(max(np.floor(side) - 1, 0)) for side in (x1, y1))
        right = int(min(np.ceil(x2) + 1, width))
        bottom = int(min(np.ceil(y2) + 1, height))
        if right <= left or bottom <= top or x2 <= x1 or y2 <= y1:
            continue
        columns = _shares(left, right, x1, x2, probability.shape[1])
        rows = _shares(top, bottom, y1, y2, probability.shape[0])
        mask[top:bottom, left:right] = rows @ probability @ columns.T >= MASK_THRESHOLD
    return masks


def _shares(start: int, stop: int, low: float, high: float, cells: int) -> Array:
    """The weight of each mask cell at each pixel along one axis, float32 ``[pixels, cells]``."""
    centres = np.arange(start, stop, dtype=np.float32) + np.float32(0.5)
    places = (centres - low) / (high - low) * cells - np.float32(0.5)
    # Linear interpolation between cell centres, with zeros outside of the mask.
    return np.maximum(1 - np.abs(places[:, None] - np.arange(cells, dtype=np.float32)), 0)


def resize(pixels: Array, height: int, width: int) -> Array:
    """Resize uint8 ``[h, w, 3]`` bilinearly, to the same values as OpenCV's ``INTER_LINEAR``."""
    old_height, old_width = pixels.shape[:2]
    if (old_height, old_width) == (height, width):
        return pixels
    wide = pixels.astype(np.int32)
    if (old_height, old_width) == (2 * height, 2 * width):  # OpenCV averages four pixels then
        sums = wide[::2, ::2] + wide[1::2, ::2] + wide[::2, 1::2] + wide[1::2, 1::2]
        return ((sums + 2) >> 2).astype(np.uint8)
    left, right, left_share, right_share = _neighbours(width, old_width, clamped=True)
    rows = wide[:, left] * left_share[:, None] + wide[:, right] * right_share[:, None]
    above, below, upper_share, lower_share = _neighbours(height, old_height, clamped=False)
    upper = ((rows[above] >> 4) * upper_share[:, None, None]) >> 16
    lower = ((rows[below] >> 4) * lower_share[:, None, None]) >> 16
    return ((upper + lower + 2) >> 2).astype(np.uint8)


def _neighbours(new: int, old: int, *, clamped: bool) -> tuple[Array, Array, Array, Array]:
    """Indices and integer weights of each new pixel's two neighbours along one axis.

    ``clamped``: beyond the border the nearest pixel has the whole weight.
    """
    places = ((np.arange(new) + 0.5) * (1 / (new / old)) - 0.5).astype(np.float32)
    lower = np.floor(places).astype(np.int64)
    share = places - lower.astype(np.float32)
    if clamped:
        share[(lower < 0) | (lower >= old - 1)] = 0
    second = np.rint(share * np.float32(FIXED_POINT)).astype(np.int32)
    first = np.rint((1 - share) * np.float32(FIXED_POINT)).astype(np.int32)
    return lower.clip(0, old - 1), (lower + 1).clip(0, old - 1), first, second
