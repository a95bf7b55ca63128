"""The sections of ``gpu_check.py`` that check results, and the program that runs a section."""

import argparse
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torchvision
from gpu_common import (
    PHOTO,
    Found,
    Setting,
    in_parts,
    milliseconds,
    photo_model,
    set_tf32,
    standin_model,
)
from gpu_feeding import batch_memory, graphs, verify
from gpu_operator import operator
from gpu_speed import attention, image_speed, operator_speed, profile, training_speed

from vitadapter_zoo.models.losses import losses
from vitadapter_zoo.ops import paste_masks

ROWS = (
    "adapter-t-deit-3x",
    "vit-t-deit-3x",
    "adapter-s-deit-3x-nofpn",
    "adapter-b-uniperceiver-3x",
)


def device(setting: Setting) -> Found:
    """Identify the device and measure how fast it copies memory and multiplies matrices."""
    size = 2**20 if setting.quick else 2**30
    source = torch.empty(size, device=setting.device)
    target = torch.empty_like(source)
    copied = milliseconds(setting, partial(target.copy_, source))
    found: Found = {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "copy_tb_s": round(8 * size / copied / 1e9, 2),
    }
    if setting.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        found["name"] = properties.name
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
    for label, (dtype, tf32) in setting.precisions.items():
        set_tf32(tf32)
        side = 256 if setting.quick else 4096 if label == "float32" else 8192
        a, b = (torch.randn(side, side, device=setting.device).to(dtype) for _ in range(2))
        rate = 2 * side**3 / milliseconds(setting, partial(torch.matmul, a, b)) / 1e9
        found[f"{label}_tflop_s"] = round(rate, 1)
    return found


def build(setting: Setting) -> Found:
    """Compile the operators for this device into the cache; a quick run compiles nothing."""
    from vitadapter_zoo.ops.build import build as compile_operators
    from vitadapter_zoo.ops.build import cuda_architectures, cuda_wanted

    libraries = [] if setting.quick else [path.name for path in compile_operators()]
    return {"libraries": libraries, "for": cuda_architectures(), "cuda_wanted": cuda_wanted()}


def sanitizer(setting: Setting) -> Found:
    """Run the kernels' own check under compute-sanitizer; on the CPU without it."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    program = (
        "import torch\n"
        "from vitadapter_zoo.ops.library import check, implementation\n"
        f"where = implementation({setting.device!r})\n"
        "assert where.compiled, where.why\n"
        f"print('error', check(torch.device({setting.device!r})))\n"
    )
    command = [sys.executable, "-c", program]
    if setting.on_gpu:
        if not Path(tool).exists():
            return {"skipped": "compute-sanitizer is not installed"}
        command = [tool, "--tool", "memcheck", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=80)
    lines = [line for line in done.stdout.splitlines() if "SUMMARY" in line or "error" in line[:5]]
    clean = any("0 errors" in line for line in lines) or not setting.on_gpu
    if done.returncode != 0 or not clean:
        raise AssertionError("; ".join(lines) or done.stderr[-300:])
    return {"memcheck": lines}


def parity(setting: Setting) -> Found:
    """Compare four rows with the stored outputs of the original, with TF32 off."""
    set_tf32(False)
    rows = ROWS[:1] if setting.quick else ROWS
    return in_parts({name: partial(_parity_of, setting, name) for name in rows})


def _parity_of(setting: Setting, name: str) -> str:
    from parity import compare

    report = compare(standin_model(setting, name))
    if failures := report.failures():
        raise AssertionError("; ".join(failures))
    return (
        f"features {max(report.features.values()):.1e}, proposals {report.proposals:.4f}, "
        f"unmatched {report.unmatched}, mask IoU {report.mask_iou:.5f}"
    )


def precision(setting: Setting) -> Found:
    """Measure how TF32, bfloat16 and float16 change T's detections with stand-in weights."""
    set_tf32(False)
    right = photo_model(setting).predict(str(PHOTO))[0]
    found: Found = {"detections": len(right)}
    for label, (dtype, tf32) in setting.precisions.items():
        mine = photo_model(setting, dtype, allow_tf32=tf32).predict(str(PHOTO))[0]
        overlaps = torchvision.ops.box_iou(right.boxes, mine.boxes)
        near = (overlaps > 0.9) & (right.labels[:, None] == mine.labels)
        found[label] = f"{len(mine)} detections; {int(near.any(1).sum())} of float32's, IoU > 0.9"
    return found


def predict(setting: Setting) -> Found:
    """Predict as a user does, and check that the masks equal those pasted on the CPU."""
    set_tf32(False)
    model = photo_model(setting)
    with torch.inference_mode():
        found = model.detect([model.preprocess(str(PHOTO))])[0]
        on_cpu = paste_masks(found.mask_probabilities, found.boxes, found.size, 0.5)
        moved = found.mask_probabilities.to(setting.device), found.boxes.to(setting.device)
        on_device = paste_masks(*moved, found.size, 0.5).cpu()
    batched = model.predict([str(PHOTO)] * 3, batch_size=3)
    return {
        "detections": len(found.boxes),
        "differing_mask_pixels": f"{int((on_device != on_cpu).sum())} of {on_cpu.numel()}",
        "batch_of_three": [len(detections) for detections in batched],
    }


def waits(setting: Setting) -> Found:
    """Count where predict and the losses wait for the GPU; the bounds are those of the tests."""
    set_tf32(False)
    model = photo_model(setting)
    item = model.preprocess(str(PHOTO))
    height, width = item.tensor.shape[-2:]
    masks = torch.zeros(1, height, width, dtype=torch.bool)
    masks[:, height // 8 : height // 2, width // 8 : width // 2] = True
    box = [width // 8, height // 8, width // 2, height // 2]
    target = {
        "boxes": torch.tensor([box], dtype=torch.float32),
        "labels": torch.tensor([3]),
        "masks": masks,
    }

    def repeated() -> None:
        with torch.inference_mode():
            model.detect([item], repeated=True)

    return in_parts(
        {
            "predict": partial(_waits_of, setting, partial(model.predict, str(PHOTO)), 3),
            "with_a_graph": partial(_waits_of, setting, repeated, 3),
            "losses": partial(_waits_of, setting, partial(losses, model, [item], [target]), 2),
        }
    )


def _waits_of(setting: Setting, call: Callable[[], object], most: int) -> list[str]:
    """Return the lines of a later call at which PyTorch reports a synchronisation."""
    for _ in range(4):
        call()
    setting.synchronize()
    if setting.on_gpu:
        torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        if setting.on_gpu:
            torch.cuda.set_sync_debug_mode("default")
    places = [
        f"{Path(warning.filename).name}:{warning.lineno}"
        for warning in caught
        if "synchronizing CUDA operation" in str(warning.message)
    ]
    if len(places) > most:
        raise AssertionError(f"{len(places)} waits instead of {most}: {'; '.join(places)}")
    return places


def batches(setting: Setting) -> Found:
    """Compare detections in batches of four and in copies of one image with those of one image."""
    set_tf32(False)
    model = photo_model(setting)
    item = model.preprocess(str(PHOTO))
    with torch.inference_mode():
        alone = model.detect([item])[0]
        together = model.detect([item] * 4)
    for index, found in enumerate(together):
        if not torch.equal(found.boxes, together[0].boxes):
            raise AssertionError(f"image {index} of a batch of copies has other boxes than image 0")
    return {
        "detections": [len(alone.boxes), len(together[0].boxes)],
        "equal_to_a_single_image": torch.equal(alone.boxes, together[0].boxes),
    }


SECTIONS: dict[str, Callable[[Setting], Found]] = {
    function.__name__: function
    for function in (
        device, build, operator, sanitizer, parity, precision, predict, waits, batches, graphs,
        batch_memory, verify, attention, operator_speed, image_speed, training_speed, profile,
    )
}  # fmt: skip


def main() -> None:
    """Run one section and print its results as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    setting = Setting(options.device, options.quick)
    if setting.on_gpu and not torch.cuda.is_available():
        print(json.dumps({"skipped": "no CUDA device"}))
    else:
        print(json.dumps(SECTIONS[options.section](setting)))


if __name__ == "__main__":
    main()
