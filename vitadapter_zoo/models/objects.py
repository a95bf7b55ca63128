"""Checking the training targets that a caller passes, and moving them to the network's device."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from vitadapter_zoo.images import NetworkInput

# "boxes", "labels" and "masks" of one image, see `read_targets`.
Target: TypeAlias = Mapping[str, Any]


class Objects(NamedTuple):
    """The objects of one image.

    Attributes:
        boxes: float32 ``[n, 4]`` as (x1, y1, x2, y2) in network pixels.
        labels: int64 ``[n]``.
        masks: bool ``[n, H, W]``; H and W are the image's padded network size.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor


def read_targets(
    targets: Sequence[Target], inputs: Sequence[NetworkInput], classes: int, device: torch.device
) -> list[Objects]:
    """Check the targets of a batch and move them to ``device``.

    Args:
        targets: per image ``boxes`` ``[n, 4]`` (x1, y1, x2, y2; network pixels), ``labels`` int64
            ``[n]`` in 0..classes - 1, and ``masks``: bool ``[n, H, W]`` of the image's padded
            network size, or ``n`` entries that are each COCO polygons (lists of x, y, x, y, ... in
            network pixels) or a COCO RLE. ``n`` may be 0.
        inputs: the images of the batch.
        classes: number of classes of the network.
        device: the network's device.

    Raises:
        ValueError: targets that do not fit the images or each other.
    """
    if len(targets) != len(inputs):
        raise ValueError(
            f"each image needs a target: got {len(inputs)} images and {len(targets)} targets"
        )
    read = []
    for index, (target, item) in enumerate(zip(targets, inputs, strict=True)):
        try:
            found = _read(target, cast("tuple[int, int]", tuple(item.tensor.shape[-2:])), classes)
        except ValueError as error:
            raise ValueError(f"targets[{index}]: {error}") from error
        read.append(Objects(*(part.to(device, non_blocking=True) for part in found)))
    return read


def _read(target: Target, size: tuple[int, int], classes: int) -> Objects:
    missing = {"boxes", "labels", "masks"} - set(target)
    if missing:
        raise ValueError(f"{', '.join(sorted(missing))} missing; give boxes, labels and masks")
    boxes = torch.as_tensor(target["boxes"], dtype=torch.float32).detach().reshape(-1, 4)
    labels = torch.as_tensor(target["labels"]).detach()
    if labels.numel() and (labels.is_floating_point() or labels.dtype == torch.bool):
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    labels = labels.long()
    masks = as_bitmaps(target["masks"], size)
    if tuple(labels.shape) != (len(boxes),) or len(masks) != len(boxes):
        raise ValueError(
            f"each box needs a label and a mask: got {len(boxes)} boxes, labels "
            f"{list(labels.shape)} and masks {list(masks.shape)}"
        )
    if not ((labels >= 0) & (labels < classes)).all():
        raise ValueError(f"labels must lie in 0..{classes - 1}, got {labels.unique().tolist()}")
    solid = ((boxes[:, 2:] > boxes[:, :2]) & boxes.isfinite().view(-1, 2, 2).all(dim=1)).all(dim=1)
    if not solid.all():
        raise ValueError(
            "boxes must be (x1, y1, x2, y2) with x1 < x2 and y1 < y2, "
            f"got {boxes[~solid][0].tolist()}; leave out objects without area"
        )
    return Objects(boxes, labels, masks)


def as_bitmaps(masks: Tensor | Sequence[Any], size: tuple[int, int]) -> Tensor:
    """Convert masks in any accepted format to bool ``[n, height, width]``.

    Args:
        masks: a tensor ``[n, height, width]``; or for each object COCO polygons in network pixels
            or a COCO RLE of the padded network size, compressed or not.
        size: (height, width) of the padded network input.

    Raises:
        ValueError: the masks have another size or another format.
    """
    if isinstance(masks, (Tensor, np.ndarray)):
        bitmaps = torch.as_tensor(masks).detach()
        if bitmaps.shape[1:] != size and bitmaps.numel():
            raise ValueError(
                f"masks must have the padded network size, [n, {size[0]}, {size[1]}], "
                f"got {list(bitmaps.shape)}"
            )
        return bitmaps.reshape(-1, *size).bool()
    if not len(masks):
        return torch.zeros(0, *size, dtype=torch.bool)
    return torch.stack([_bitmap(mask, size) for mask in masks])


def _bitmap(mask: Any, size: tuple[int, int]) -> Tensor:
    from hotcoco import mask as coco_mask

    if isinstance(mask, Tensor):
        return as_bitmaps(mask[None], size)[0]
    if isinstance(mask, Mapping):
        if tuple(mask["size"]) != size:
            raise ValueError(
                f"an RLE must have the padded network size {list(size)}, got {list(mask['size'])}"
            )
        counts = mask["counts"]
        compressed = isinstance(counts, (str, bytes))
        rle = dict(mask) if compressed else coco_mask.frPyObjects(dict(mask), *size)
    elif isinstance(mask, Sequence) and not isinstance(mask, (str, bytes)):
        polygons = mask if len(mask) and isinstance(mask[0], Sequence) else [mask]
        rle = coco_mask.merge(coco_mask.frPyObjects([list(part) for part in polygons], *size))
    else:
        raise ValueError(
            "a mask must be a bool tensor, a list of polygons or a COCO RLE, "
            f"got {type(mask).__name__}"
        )
    return torch.from_numpy(np.ascontiguousarray(coco_mask.decode(rle))).bool()
