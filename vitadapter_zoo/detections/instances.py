"""The network's output for one image, before the masks are pasted onto the image."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Instances:
    """One image's detections as the network outputs them, with masks relative to their boxes.

    Attributes:
        boxes: float32 ``[N, 4]`` as (x1, y1, x2, y2) in image pixels.
        scores: float32 ``[N]`` in 0..1, best first.
        labels: int64 ``[N]``, index of the class.
        mask_probabilities: float32 ``[N, 28, 28]`` in 0..1, covering the box.
        size: (height, width) of the image in pixels.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    mask_probabilities: Tensor
    size: tuple[int, int]
