"""Measure pasting and RLE-encoding the masks of an image, compared with other implementations.

    python benchmarks/masks.py [--masks 100] [--size 480 640] [--rounds 9] [--threads N]

``whole image`` is mmdet's method on a GPU: every mask is resampled over the whole image into a
single [N, H, W] array, and encoded from a copy in Fortran order, mask by mask. ``box regions`` is
mmdet's method on the CPU: only the box's region is resampled. ``regions, in order`` is the fallback
of `paste_rle`, which encodes from a transposed image. All of these encode with hotcoco. Every round
runs all methods, and every run checks that the RLEs are equal. The script prints medians.

The masks are ellipses with irregular outlines and edges two cells wide, like a mask head's output.
Sizes follow COCO: 41% small (the square root of the box's area is 8 to 32 pixels), 34% medium (32
to 96) and 25% large (96 to 400), with a uniform distribution of the logarithm. Aspect ratios are
1:2 to 2:1. Boxes are clipped to the image.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from hotcoco import mask as coco_mask
from torch import Tensor

from vitadapter_zoo.ops import masks

# Shares of objects by size, from cocodataset.org, "Detection Evaluation".
SHARES = (0.41, 0.34, 0.25)
SIDES = ((8.0, 32.0), (32.0, 96.0), (96.0, 400.0))
MAP = 28
THRESHOLD = 0.5


def sample(count: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Create probabilities ``[count, 28, 28]`` and boxes ``[count, 4]`` of an image."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    kinds = torch.multinomial(torch.tensor(SHARES), count, True, generator=generator)
    low, high = torch.tensor(SIDES)[kinds].log().unbind(1)
    sides = (low + uniform(count) * (high - low)).exp()
    stretch = torch.exp((uniform(count) * 2 - 1) * math.log(2) / 2)
    extents = torch.stack([sides * stretch, sides / stretch], dim=1)
    limits = torch.tensor([size[1], size[0]], dtype=torch.float32)
    centres = uniform(count, 2) * limits
    boxes = torch.cat([centres - extents / 2, centres + extents / 2], dim=1)
    boxes = boxes.clamp(min=0).minimum(limits.repeat(2))

    y, x = torch.meshgrid(*[torch.arange(MAP) + 0.5 - MAP / 2] * 2, indexing="ij")
    angle, radius = torch.atan2(y, x), torch.hypot(x, y)
    wander = torch.zeros(count, MAP, MAP)
    for wave in (2, 3, 5):
        shift = uniform(count, 1, 1) * 2 * math.pi
        wander += (angle * wave + shift).sin() * uniform(count, 1, 1) * 2 / wave
    edge = MAP * 0.42 + wander
    return ((edge - radius) * 2).sigmoid(), boxes


def whole_image(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[str]:
    """Resample over the whole image, then encode mask by mask."""
    height, width = size
    x = torch.arange(width) + 0.5
    y = torch.arange(height) + 0.5
    x1, y1, x2, y2 = boxes[:, :, None].unbind(1)
    x = (x - x1) / (x2 - x1) * 2 - 1
    y = (y - y1) / (y2 - y1) * 2 - 1
    count = len(boxes)
    grid = torch.stack(
        [
            x[:, None, :].expand(count, height, width),
            y[:, :, None].expand(count, height, width),
        ],
        dim=3,
    )
    pasted = F.grid_sample(probabilities[:, None], grid, align_corners=False)[:, 0]
    return _encode_one_by_one(pasted >= THRESHOLD)


def box_regions(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[str]:
    """Resample each box's region into a whole-image mask, then encode mask by mask."""
    return _encode_one_by_one(masks.paste_masks(probabilities, boxes, size, THRESHOLD))


def _encode_one_by_one(pasted: Tensor) -> list[str]:
    return [
        coco_mask.encode(np.array(mask[:, :, None], order="F", dtype="uint8"))[0]["counts"].decode()
        for mask in pasted.numpy()
    ]


def regions_in_order(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[str]:
    """Encode as `paste_rle` does without the compiled kernel."""
    return masks._composed(probabilities, boxes, size, THRESHOLD)


def main() -> None:
    """Print the median times, absolute and relative to this package's."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--masks", type=int, default=100)
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("H", "W"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = (options.size[0], options.size[1])
    probabilities, boxes = sample(options.masks, size)

    ways: dict[str, Callable[[Tensor, Tensor, tuple[int, int]], list[str]]] = {
        "paste_rle": masks.paste_rle,
        "regions, in order": regions_in_order,
        "box regions": box_regions,
        "whole image": whole_image,
    }
    right = masks.paste_rle(probabilities, boxes, size)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            begin = time.perf_counter()
            found = way(probabilities, boxes, size)
            times[name].append(time.perf_counter() - begin)
            if found != right:
                raise SystemExit(f"the RLEs of {name!r} differ from this package's")

    how = masks.implementation()
    print(
        f"{options.masks} masks on {size[1]} x {size[0]}, {options.threads} threads, "
        f"{'compiled' if how.compiled else 'not compiled'}: {how.why}"
    )
    ours = statistics.median(times["paste_rle"])
    for name, taken in times.items():
        median = statistics.median(taken)
        print(f"{name:<18} {median * 1e3:9.3f} ms {median / ours:8.1f}x")


if __name__ == "__main__":
    main()
