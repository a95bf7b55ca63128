"""The sections of ``gpu_check.py`` that check results, and the program that runs a section."""

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torchvision
from gpu_common import PHOTO, Found, differentiable, milliseconds, set_tf32, standin_model
from gpu_speed import image_speed, operator_speed, profile, training_speed
from torch import Tensor

from vitadapter_zoo.models.losses import losses
from vitadapter_zoo.ops import ms_deform_attn, ms_deform_attn_fused, paste_masks, reference
from vitadapter_zoo.ops.library import check, implementation

ROWS = (
    "adapter-t-deit-3x",
    "vit-t-deit-3x",
    "adapter-s-deit-3x-nofpn",
    "adapter-b-uniperceiver-3x",
)
# The largest errors that rounding can cause, relative to the largest value of the output.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
CHANNELS = (1, 3, 4, 8, 16, 20, 24, 32, 48, 64, 80, 128)
LEVELS = {
    1: [(13, 9)],
    2: [(9, 7), (3, 1)],
    3: [(12, 10), (6, 5), (3, 3)],
    4: [(8, 8), (4, 4), (2, 2), (1, 1)],
}


def device() -> Found:
    """Identify the GPU and measure how fast it copies memory and multiplies matrices."""
    properties = torch.cuda.get_device_properties(0)
    source = torch.empty(2**30, device="cuda")
    target = torch.empty_like(source)
    found: Found = {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "copy_tb_s": round(8 * 2**30 / milliseconds(partial(target.copy_, source)) / 1e9, 2),
    }
    for label, dtype, tf32, side in (
        ("float32", torch.float32, False, 4096),
        ("tf32", torch.float32, True, 8192),
        ("bfloat16", torch.bfloat16, False, 8192),
    ):
        set_tf32(tf32)
        a, b = (torch.randn(side, side, device="cuda").to(dtype) for _ in range(2))
        rate = 2 * side**3 / milliseconds(partial(torch.matmul, a, b)) / 1e9
        found[f"{label}_tflop_s"] = round(rate, 1)
    return found


def build() -> Found:
    """Compile the operators for this device into the cache."""
    from vitadapter_zoo.ops.build import build as compile_operators
    from vitadapter_zoo.ops.build import cuda_architectures

    return {
        "libraries": [path.name for path in compile_operators()],
        "for": cuda_architectures(),
    }


def operator() -> Found:
    """Compare the operators, plain and fused, with float64 on the CPU, forward and backward."""
    where = implementation("cuda")
    if not where.compiled:
        raise RuntimeError(where.why)
    torch.manual_seed(0)
    worst: dict[str, float] = {}
    cases = 0
    for name, error, limit in _operator_errors():
        kind = name.split(",")[0]
        worst[kind] = max(worst.get(kind, 0.0), error)
        cases += 1
        if not error <= limit:
            raise AssertionError(f"{name}: relative error {error:.1e}")
    return {
        "library": where.why,
        "check_error": f"{check(torch.device('cuda')):.1e}",
        "outputs_compared": cases,
        "worst_relative_error": {kind: f"{error:.1e}" for kind, error in worst.items()},
        "opcheck": _opcheck(),
        "deterministic_mode": _deterministic_mode(),
    }


def _operator_errors() -> Iterator[tuple[str, float, float]]:
    """Yield the name, relative error and limit of every output of every case."""
    for dtype, limit in TOLERANCES.items():
        for channels in CHANNELS:
            for levels, points in ((1, 4), (2, 3), (3, 4), (4, 4)):
                plain, fused = _case(dtype, channels, levels, points)
                grad = torch.randn(2, 37, 3 * channels).to(dtype)
                for kind, mine, right, given in (
                    ("plain", ms_deform_attn, reference.ms_deform_attn, plain),
                    ("fused", ms_deform_attn_fused, _fused_reference, fused),
                ):
                    wide = [x if x.dtype == torch.int64 else x.double() for x in given]
                    got = _with_gradients(mine, [x.cuda() for x in given], grad.cuda())
                    expected = _with_gradients(right, wide, grad.double())
                    name = f"{kind} {str(dtype)[6:]}, {channels} channels, {levels} x {points}"
                    for a, b in zip(got, expected, strict=True):
                        difference = (a.cpu().double() - b).nan_to_num(0).abs().max()
                        scale = b.nan_to_num(0).abs().max().clamp(min=1e-9)
                        yield name, float(difference / scale), limit


def _fused_reference(
    value: Tensor, shapes: Tensor, points: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    return reference.ms_deform_attn(
        value, shapes, *reference.locate(shapes, points, offsets, logits)
    )


def _case(
    dtype: torch.dtype, channels: int, levels: int, points: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Create arguments of the plain and the fused operator on the CPU.

    Gradients are discontinuous at a pixel's centre. Every location is at least a quarter of a pixel
    away from all centres, so rounding cannot move it to the other side.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = torch.tensor(LEVELS[levels])
    sizes = shapes.flip(-1)[:, None].to(wide)
    grouped = (2, 37, 3, levels, points)
    value = torch.randn(2, int(shapes.prod(1).sum()), 3, channels).to(dtype)
    pixels = torch.randint(-1, 14, (*grouped, 2)) + torch.randint(0, 2, (*grouped, 2)) / 2 + 0.25
    locations = pixels.to(wide) / sizes
    locations.view(-1)[3] = float("nan")
    logits = torch.randn(grouped).to(dtype)
    reference_points = (torch.randint(0, 8, (37, 2)) / 8).to(wide)
    offsets = (pixels.to(wide) - reference_points[:, None, None, None] * sizes).to(dtype)
    plain = (value, shapes, locations, logits.sigmoid())
    return plain, (value, shapes, reference_points, offsets, logits)


def _with_gradients(
    function: Callable[..., Tensor], arguments: list[Tensor], grad: Tensor
) -> list[Tensor]:
    """Return the output and the gradients of value and of the last two arguments."""
    leaves, wanted = differentiable(arguments)
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, wanted, grad)]


def _opcheck() -> str:
    plain, _ = _case(torch.float32, 32, 3, 4)
    value, shapes, locations, weights = (tensor.cuda() for tensor in plain)
    arguments = (value.requires_grad_(), shapes, locations.nan_to_num(0.3), weights)
    torch.library.opcheck(torch.ops.vitadapter_zoo.ms_deform_attn, arguments)
    return "passed"


def _deterministic_mode() -> str:
    plain, _ = _case(torch.float32, 32, 3, 4)
    value, *rest = (tensor.cuda() for tensor in plain)
    torch.use_deterministic_algorithms(True)
    try:
        ms_deform_attn(value.requires_grad_(), *rest).sum().backward()
    except RuntimeError as error:
        if "not deterministic" not in str(error):
            raise
        return "alerts"
    finally:
        torch.use_deterministic_algorithms(False)
    raise AssertionError("the backward pass did not raise in deterministic mode")


def sanitizer() -> Found:
    """Run the kernels' own check under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return {"skipped": "compute-sanitizer is not installed"}
    program = (
        "import torch\n"
        "from vitadapter_zoo.ops.library import check, implementation\n"
        "assert implementation('cuda').compiled, implementation('cuda').why\n"
        "print('error', check(torch.device('cuda')))\n"
    )
    command = [tool, "--tool", "memcheck", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=80)
    lines = [line for line in done.stdout.splitlines() if "SUMMARY" in line or "error" in line[:5]]
    if done.returncode != 0 or not any("SUMMARY: 0 errors" in line for line in lines):
        raise RuntimeError(" ".join(lines) or done.stderr[-300:])
    return {"memcheck": lines}


def parity() -> Found:
    """Compare four rows with the stored outputs of the original, with TF32 off."""
    from parity import compare

    set_tf32(False)
    rows, failures = [], []
    for name in ROWS:
        report = compare(standin_model(name))
        failures += [f"{name}: {failure}" for failure in report.failures()]
        rows.append(
            f"{name}: features {max(report.features.values()):.1e}, "
            f"proposals {report.proposals:.4f}, unmatched {report.unmatched}, "
            f"mask IoU {report.mask_iou:.5f}"
        )
    if failures:
        raise AssertionError("; ".join(failures))
    return {"rows": rows}


def precision() -> Found:
    """Measure how TF32, bfloat16 and float16 change T's detections with stand-in weights."""
    set_tf32(False)
    right = standin_model(ROWS[0]).predict(str(PHOTO))[0]
    found: Found = {"detections": len(right)}
    for label, dtype, tf32 in (
        ("tf32", torch.float32, True),
        ("bfloat16", torch.bfloat16, False),
        ("float16", torch.float16, False),
    ):
        mine = standin_model(ROWS[0], dtype, allow_tf32=tf32).predict(str(PHOTO))[0]
        overlaps = torchvision.ops.box_iou(right.boxes, mine.boxes)
        near = (overlaps > 0.9) & (right.labels[:, None] == mine.labels)
        found[label] = f"{len(mine)} detections; {int(near.any(1).sum())} of float32's, IoU > 0.9"
    return found


def predict() -> Found:
    """Predict as a user does, and check that the masks equal those pasted on the CPU."""
    set_tf32(False)
    model = standin_model(ROWS[0])
    with torch.inference_mode():
        found = model.detect([model.preprocess(str(PHOTO))])[0]
        on_cpu = paste_masks(found.mask_probabilities, found.boxes, found.size, 0.5)
        moved = found.mask_probabilities.cuda(), found.boxes.cuda()
        on_gpu = paste_masks(*moved, found.size, 0.5).cpu()
    batched = model.predict([str(PHOTO)] * 3, batch_size=3)
    return {
        "detections": len(found.boxes),
        "differing_mask_pixels": f"{int((on_gpu != on_cpu).sum())} of {on_cpu.numel()}",
        "batch_of_three": [len(detections) for detections in batched],
    }


def waits() -> Found:
    """Count where predict and the losses wait for the GPU; the bounds are those of the tests."""
    set_tf32(False)
    model = standin_model(ROWS[0])
    item = model.preprocess(str(PHOTO))
    height, width = item.tensor.shape[-2:]
    masks = torch.zeros(1, height, width, dtype=torch.bool)
    masks[:, 40:400, 40:400] = True
    target = {
        "boxes": torch.tensor([[40.0, 40, 400, 400]]),
        "labels": torch.tensor([3]),
        "masks": masks,
    }
    found: Found = {}
    for name, call, most in (
        ("predict", partial(model.predict, str(PHOTO)), 3),
        ("losses", partial(losses, model, [item], [target]), 2),
    ):
        places = _waits_of(call)
        found[name] = f"{len(places)} of at most {most}"
        found[f"{name}_at"] = places
        if len(places) > most:
            raise AssertionError(f"{name} waits {len(places)} times: {'; '.join(places)}")
    return found


def _waits_of(call: Callable[[], object]) -> list[str]:
    """Return the lines of the second call at which PyTorch reports a synchronisation."""
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [
        f"{Path(warning.filename).name}:{warning.lineno}"
        for warning in caught
        if "synchronizing CUDA operation" in str(warning.message)
    ]


def batches() -> Found:
    """Compare detections in batches of four and in copies of one image with those of one image."""
    set_tf32(False)
    model = standin_model(ROWS[0])
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


SECTIONS: dict[str, Callable[[], Found]] = {
    function.__name__: function
    for function in (
        device, build, operator, sanitizer, parity, precision, predict, waits, batches,
        operator_speed, image_speed, training_speed, profile,
    )
}  # fmt: skip

if __name__ == "__main__":
    if torch.cuda.is_available():
        print(json.dumps(SECTIONS[sys.argv[1]]()))
    else:
        print(json.dumps({"skipped": "no CUDA device"}))
