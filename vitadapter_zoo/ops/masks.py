"""Paste masks into the image, as pixels or directly as COCO's compressed run lengths.

The compiled kernel encodes while it resamples, so it needs no mask of the image's size. Where it
cannot be used, PyTorch resamples and hotcoco encodes, to the same characters.
"""

import functools
import itertools
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vitadapter_zoo import settings
from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.ops import library
from vitadapter_zoo.ops.deform_attn import LIBRARY
from vitadapter_zoo.ops.library import Implementation

# Returns the concatenated texts as bytes, and the end of each. `fused`: whether a product and its
# sum are rounded once, as this build of torch may do in grid_sample; see `_fuses`.
LIBRARY.define(
    "_paste_rle(Tensor probabilities, Tensor boxes, int height, int width, float threshold, "
    "bool fused) -> (Tensor, Tensor)"
)
MOST_PIXELS = 2**31 - 1  # the runs of a mask are 32-bit integers
STRIP_PIXELS = 1 << 20  # resampled at a time: bounds the memory, whatever the image's size


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
    for index, rows, columns, inside in paste_strips(probabilities, boxes, size, threshold):
        masks[index, rows, columns] = inside
    return masks


def paste_strips(
    probabilities: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float
) -> Iterator[tuple[int, slice, slice, Tensor]]:
    """`paste_masks` piece by piece, so that no mask of the image's size is needed.

    Arguments and errors are those of `paste_masks`.

    Yields:
        The index of a mask, the rows and columns of a strip of its box on the image, and the mask
        there, bool ``[rows, columns]``, at most a million pixels. A mask is False outside of its
        strips; the strips of one mask follow one another.
    """
    _check(probabilities, boxes, size)
    for index, rows, columns, values in _sampled(probabilities, boxes, size):
        yield index, rows, columns, values >= threshold


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
    probabilities, boxes = probabilities.detach().cpu(), boxes.detach().cpu()
    if implementation().compiled:
        return _compiled(probabilities, boxes, size, threshold, _fuses() is True)
    return _composed(probabilities, boxes, size, threshold)


def implementation() -> Implementation:
    """What computes `paste_rle`; `library.implementation` says the same of the attention.

    Raises:
        ZooError: ``VITADAPTER_ZOO_OP=compiled`` and the compiled kernel cannot be used, or the
            variable has another value.
    """
    found = library.implementation(torch.device("cpu"))
    if not found.compiled:
        return found
    fuses = _fuses()
    if fuses is None:
        reason = f"{found.why} pastes masks unlike this torch's grid_sample"
        if settings.operator() == "compiled":
            raise ZooError(f"VITADAPTER_ZOO_OP=compiled, but {reason}")
        return Implementation(compiled=False, why=reason)
    return Implementation(compiled=True, why=f"{found.why}{', fused' if fuses else ''}")


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
    if height < 1 or width < 1 or height * width > MOST_PIXELS:
        raise ValueError(
            f"size (height, width) must be from 1 to {MOST_PIXELS} pixels in all, got {tuple(size)}"
        )
    if not boxes.isfinite().all():
        raise ValueError("a box is NaN or infinite; check the network's weights and its input")


def _sampled(
    probabilities: Tensor, boxes: Tensor, size: tuple[int, int]
) -> Iterator[tuple[int, slice, slice, Tensor]]:
    """Of each strip of a mask: the mask's index, the strip's rows and columns, its values."""
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
        for part in y.split(max(STRIP_PIXELS // len(x), 1)):
            grid = torch.stack(torch.meshgrid(x, part, indexing="xy"), dim=-1)
            values = F.grid_sample(
                probabilities[index][None, None], grid[None], align_corners=False
            )
            yield index, slice(top, top + len(part)), slice(left, right), values[0, 0]
            top += len(part)


def _compiled(
    probabilities: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float, fused: bool
) -> list[str]:
    """`paste_rle` by the compiled kernel."""
    text, ends = torch.ops.vitadapter_zoo._paste_rle(probabilities, boxes, *size, threshold, fused)
    together = text.numpy().tobytes().decode()
    stops = ends.tolist()
    return [together[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]


def _composed(
    probabilities: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float
) -> list[str]:
    """`paste_rle` by PyTorch's operators and hotcoco, which define its result."""
    from hotcoco import mask as coco_mask

    # Runs go down the columns: a transposed image is in their order.
    image = torch.zeros(size[1], size[0], dtype=torch.uint8, device="cpu")
    columns = image.numpy().T
    empty = coco_mask.encode(columns)["counts"].decode()
    counts = [empty] * len(boxes)
    strips = _sampled(probabilities, boxes, size)
    for index, parts in itertools.groupby(strips, key=lambda strip: strip[0]):
        for _, rows, cols, values in parts:
            image[cols, rows] = (values >= threshold).T.to(torch.uint8)
        counts[index] = coco_mask.encode(columns)["counts"].decode()
        image.zero_()
    return counts


@functools.cache
def _fuses() -> bool | None:
    """Whether grid_sample rounds a product and its sum once (fused) on this machine.

    That depends on torch's build and on the processor's instruction set. None, with a warning, if
    the kernel agrees with grid_sample in neither mode.
    """
    for fused in (True, False):
        try:
            if all(_compiled(*case, fused) == _composed(*case) for case in _cases()):
                return fused
        except NotImplementedError:  # compiled from sources older than the kernel
            break
    warnings.warn(
        "masks are pasted by PyTorch's own operators, several times slower: the compiled kernel "
        "does not give their results here; `vitadapter-zoo build-op` compiles it again",
        stacklevel=3,
    )
    return None


def _cases() -> Iterator[tuple[Tensor, Tensor, tuple[int, int], float]]:
    """Small masks whose thresholds are values of their own pixels, so that one wrong bit shows."""
    steps = torch.arange(3 * 28 * 28, dtype=torch.float32, device="cpu")
    waves = (steps * 0.7548776662).sin().view(3, 28, 28) * 0.5 + 0.5
    boxes = torch.tensor(
        [[2.3, 1.7, 60.1, 40.9], [-7.2, 3, 30.6, 50], [5.5, 5.5, 9.2, 8.1]],
        dtype=torch.float32,
        device="cpu",
    )
    size = (45, 67)
    for index, _, _, values in _sampled(waves, boxes, size):
        for threshold in values.flatten()[::41].tolist():
            yield waves[index : index + 1], boxes[index : index + 1], size, threshold
