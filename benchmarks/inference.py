"""Seconds per image and stage: `make benchmark`, or this file with load names behind it.

One image of 800 x 1216 network pixels, batch 1, float32, random weights (time does not depend on
them, but the number of detections does: the mask head always gets 100 boxes here). Medians.
"""

import contextlib
import statistics
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import vitadapter_zoo
from vitadapter_zoo.models.heads import BoxDetections
from vitadapter_zoo.ops import paste_masks

NAMES = ["adapter-t-deit-3x", "adapter-s-deit-3x", "adapter-b-deit-3x", "adapter-l-augreg-3x"]
ROUNDS = 3


@contextlib.contextmanager
def timed(times: dict[str, list[float]], stage: str) -> Iterator[None]:
    """Note how long the block takes."""
    start = time.perf_counter()
    yield
    times.setdefault(stage, []).append(time.perf_counter() - start)


def hundred_boxes() -> BoxDetections:
    """100 boxes of many sizes on a 640 x 427 image."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(100, 2, generator=generator) * torch.tensor([600.0, 390.0])
    side = torch.rand(100, 2, generator=generator) * 200 + 10
    boxes = torch.cat([corner, (corner + side).minimum(torch.tensor([640.0, 427.0]))], dim=1)
    return BoxDetections(boxes, torch.ones(100), torch.arange(100) % 80)


@torch.inference_mode()
def measure(name: str) -> dict[str, float]:
    """Median seconds of each stage."""
    model = vitadapter_zoo.load(name, pretrained=False)
    image = np.random.default_rng(0).integers(0, 256, (427, 640, 3), dtype=np.uint8)
    found = hundred_boxes()
    times: dict[str, list[float]] = {}
    for _ in range(ROUNDS + 1):  # the first round warms up
        with timed(times, "preprocess"):
            prepared = model.preprocess(image)
        sizes, scales = [prepared.resized], [prepared.scale]
        with timed(times, "backbone"):
            maps = model.backbone(prepared.tensor)
        with timed(times, "neck"):
            levels = model.neck(maps)
        with timed(times, "rpn"):
            proposals = model.rpn_head.propose(levels, sizes)
        with timed(times, "box head"):
            model.roi_head.detect_boxes(levels[:4], proposals, sizes, scales, 0.05)
        with timed(times, "mask head"):
            masks = model.roi_head.predict_masks(levels[:4], [found], scales)
        with timed(times, "paste"):
            paste_masks(masks[0], found.boxes, prepared.original, 0.5)
    medians = {stage: statistics.median(values[1:]) for stage, values in times.items()}
    return {**medians, "total": sum(medians.values())}


def main() -> None:
    """Measure the named rows, or one of each size, in turn."""
    names = sys.argv[1:] or NAMES
    results = {name: measure(name) for name in names}
    table = Table(title=f"seconds per image, {torch.get_num_threads()} threads, float32")
    table.add_column("stage")
    for name in names:
        table.add_column(name, justify="right")
    for stage in results[names[0]]:
        table.add_row(stage, *(f"{results[name][stage]:.3f}" for name in names))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
