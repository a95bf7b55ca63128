"""The sections of ``gpu_check.py`` about many images: CUDA graphs, batches and ``verify``."""

import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from gpu_common import PHOTO, SMALL, Found, Setting, in_parts, milliseconds, photo_model, set_tf32

import vitadapter_zoo
from vitadapter_zoo.evaluation import batching
from vitadapter_zoo.models.graphs import CALLS_BEFORE


def graphs(setting: Setting) -> Found:
    """Compare detections by CUDA graphs with those without, and measure both."""
    set_tf32(False)
    return in_parts(
        {
            label: partial(_graphs_in, setting, dtype, allow_tf32=tf32)
            for label, (dtype, tf32) in setting.precisions.items()
        }
    )


def _graphs_in(setting: Setting, dtype: torch.dtype, *, allow_tf32: bool) -> Found:
    model = photo_model(setting, dtype, allow_tf32=allow_tf32)
    item = model.preprocess(str(PHOTO))
    with torch.inference_mode():
        right = model.detect([item])[0]
        for _ in range(CALLS_BEFORE + 2):
            found = model.detect([item], repeated=True)[0]
        if model.graphs.failed:
            raise AssertionError(model.graphs.failed)
        if len(model.graphs) != setting.on_gpu:
            raise AssertionError(f"{len(model.graphs)} graphs after {CALLS_BEFORE + 2} images")
        if len(found.boxes) != len(right.boxes):
            raise AssertionError(f"{len(found.boxes)} detections instead of {len(right.boxes)}")
        off = float((found.boxes - right.boxes).abs().max()) if len(right.boxes) else 0.0
        usual = milliseconds(setting, partial(model.detect, [item]), runs=10)
        replayed = milliseconds(setting, partial(model.detect, [item], repeated=True), runs=10)
        # Weights changed in place take effect in the graph.
        for parameter in model.rpn_head.rpn_reg.parameters():
            parameter.mul_(0.5)
        changed = model.detect([item])[0]
        by_graph = model.detect([item], repeated=True)[0]
        if len(changed.boxes) != len(by_graph.boxes):
            raise AssertionError("a graph computes with weights from before a change in place")
    return {
        "box_difference": off,
        "ms": f"{usual:.2f} without, {replayed:.2f} with a graph",
    }


def batch_memory(setting: Setting) -> Found:
    """Report the memory of an image and the batch size that ``verify`` chooses by it."""
    found: Found = {}
    for label, (dtype, tf32) in setting.precisions.items():
        model = photo_model(setting, dtype, allow_tf32=tf32)
        if not setting.on_gpu:
            found[label] = {"batch_size": batching.chosen_size(model)}
            continue
        per_image, free = batching.bytes_per_image(model), batching.free_bytes(model)
        found[label] = {
            "mib_per_image": round(per_image / 2**20),
            "free_mib": round(free / 2**20),
            "batch_size": batching.size_that_fits(free, per_image),
        }
    return found


def verify(setting: Setting) -> Found:
    """Run ``verify`` on the package's own detector and data set; report AP and images per second.

    A second call of the same run must find all results and give the same digits.
    """
    parts = {
        label: partial(_verify_in, setting, dtype, allow_tf32=tf32)
        for label, (dtype, tf32) in setting.precisions.items()
    }
    return in_parts(parts)


def _verify_in(setting: Setting, dtype: torch.dtype, *, allow_tf32: bool) -> str:
    with tempfile.TemporaryDirectory() as folder:
        figures = []
        for _ in range(2):
            started = time.perf_counter()
            result = vitadapter_zoo.verify(
                SMALL,
                device=setting.device,
                dtype=dtype,
                allow_tf32=allow_tf32,
                limit=4 if setting.quick else None,
                run=Path(folder) / "run",
                offline=True,
                progress=False,
            )
            seconds = time.perf_counter() - started
            figures.append((100 * result.box.ap, 100 * result.mask.ap, result.evaluated, seconds))
    first, second = figures
    if first[:3] != second[:3]:
        raise AssertionError(f"the continued run has other figures: {first}, then {second}")
    box_ap, mask_ap, images, seconds = first
    return (
        f"{images} images, box AP {box_ap:.2f}, mask AP {mask_ap:.2f}, "
        f"{images / seconds:.1f} images/s with loading"
    )
