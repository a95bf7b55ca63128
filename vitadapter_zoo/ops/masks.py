"""Pasting masks into the image: as pixels, or at once as COCO's compressed run lengths.

The compiled kernel writes the runs down while it resamples, and never has a mask of the image's
size. It gives the same digits as resampling with PyTorch and encoding with hotcoco, which is what
computes where it cannot be used.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def paste_masks(
    probabilities: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float
) -> Tensor:
    """Resample each mask into its box on the image and threshold it (>=).

    Bilinear between pixel centres, zero outside the map. Only a box's own region is touched.

    Args:
        probabilities: float32 ``[N, M, M]`` in 0..1; the networks' are 28 x 28.
        boxes: float32 ``[N, 4]`` as (x1, y1, x2, y2) in image pixels; parts outside the image are
            left out.
        size: (height, width) of the image in pixels.
        threshold: smallest probability that belongs to the object.

    Returns:
        bool ``[N, height, width]``.

    Raises:
        ValueError: shapes that do not fit each other, boxes that are NaN or infinite, or an image
            without pixels.
        TypeError: a dtype other than float32.
    """
    _check(probabilities, boxes, size)
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool, device=boxes.device)
    for index, rows, columns, inside in _regions(probabilities, boxes, size, threshold):
        masks[index, rows, columns] = inside
    return masks


def paste_rle(
    probabilities: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5
) -> list[str]:
    """`paste_masks`, encoded as COCO's compressed run lengths.

    Equal to ``hotcoco.mask.encode`` (and pycocotools') of every mask that `paste_masks` gives on
    the CPU, character by character.

    Args:
        probabilities: float32 ``[N, M, M]`` in 0..1, on any device; the networks' are 28 x 28.
        boxes: float32 ``[N, 4]`` as (x1, y1, x2, y2) in image pixels; parts outside the image are
            left out.
        size: (height, width) of the image in pixels.
        threshold: smallest probability that belongs to the object.

    Returns:
        What COCO's results hold as ``counts`` beside ``size``, one per mask.

    Raises:
        ValueError: shapes that do not fit each other, boxes that are NaN or infinite, or an image
            without pixels.
        TypeError: a dtype other than float32.
    """
    _check(probabilities, boxes, size)
    return _paste_and_encode(probabilities.detach().cpu(), boxes.detach().cpu(), size, threshold)


def _check(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> None:
    if (
        probabilities.dim() != 3
        or tuple(boxes.shape) != (len(probabilities), 4)
        or 0 in probabilities.shape[1:]
    ):
        raise ValueError(
            "masks are pasted from probabilities [N, M, M] and boxes [N, 4], "
            f"got {list(probabilities.shape)} and {list(boxes.shape)}"
        )
    if probabilities.dtype != torch.float32 or boxes.dtype != torch.float32:
        raise TypeError(
            f"probabilities and boxes must be float32, got {probabilities.dtype} and {boxes.dtype}"
        )
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"the image has no pixels: size (height, width) is {tuple(size)}")
    if not boxes.isfinite().all():
        raise ValueError("a box is NaN or infinite; check the network's weights and its input")


def _regions(
    probabilities: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float
) -> Iterator[tuple[int, slice, slice, Tensor]]:
    """Of each mask on the image: its index, the rows and columns of its region, the bool pixels."""
    height, width = size
    limits = boxes.new_tensor([width, height])
    lower = (boxes[:, :2].floor() - 1).clamp(min=0).minimum(limits)
    upper = (boxes[:, 2:].ceil() + 1).minimum(limits).maximum(lower)
    corners = torch.cat([lower, upper], dim=1).long().tolist()
    for index, (left, top, right, bottom) in enumerate(corners):
        if left == right or top == bottom:
            continue
        x1, y1, x2, y2 = boxes[index]
        x = torch.arange(left, right, dtype=torch.float32, device=boxes.device) + 0.5
        y = torch.arange(top, bottom, dtype=torch.float32, device=boxes.device) + 0.5
        # A box without area divides by zero; an infinite place samples the centre, as the original.
        x = torch.nan_to_num((x - x1) / (x2 - x1) * 2 - 1, posinf=0, neginf=0)
        y = torch.nan_to_num((y - y1) / (y2 - y1) * 2 - 1, posinf=0, neginf=0)
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        region = F.grid_sample(probabilities[index][None, None], grid[None], align_corners=False)
        yield index, slice(top, bottom), slice(left, right), region[0, 0] >= threshold


def _paste_and_encode(
    probabilities: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float
) -> list[str]:
    """What `paste_rle` gives, by PyTorch's own operators and hotcoco."""
    from hotcoco import mask as coco_mask

    # Runs go down the columns: a transposed image is in their order.
    image = torch.zeros(size[1], size[0], dtype=torch.uint8)
    columns = image.numpy().T
    empty = coco_mask.encode(columns)["counts"].decode()
    counts = [empty] * len(boxes)
    for index, rows, cols, inside in _regions(probabilities, boxes, size, threshold):
        image[cols, rows] = inside.T.to(torch.uint8)
        counts[index] = coco_mask.encode(columns)["counts"].decode()
        image[cols, rows] = 0
    return counts
