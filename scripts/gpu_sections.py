"""The sections of ``gpu_check.py``: each prints one line of JSON as its last."""

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Found = dict[str, Any]
PROJECT = Path(__file__).resolve().parents[1]
PHOTO = PROJECT / "tests" / "data" / "rocket.jpg"
ROWS = ("adapter-t-deit-3x", "vit-t-deit-3x", "adapter-s-deit-3x-nofpn", "adapter-b-uniperceiver-3x")
SIZES = {
    "T": "adapter-t-deit-3x",
    "S": "adapter-s-deit-3x",
    "B": "adapter-b-deit-3x",
    "L": "adapter-l-augreg-3x",
}


def set_tf32(allowed: bool) -> None:
    """Switch TF32 in convolutions and matrix products."""
    precision = "tf32" if allowed else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision


def milliseconds(call: Callable[[], object], runs: int = 20, warm_up: int = 3) -> float:
    """The median time of a call between two CUDA events."""
    for _ in range(warm_up):
        call()
    torch.cuda.synchronize()
    taken = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    return statistics.median(taken)


def in_turn(calls: dict[str, Callable[[], object]], runs: int = 15) -> dict[str, float]:
    """The median time in ms of each call; every round measures all of them."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
        call()
    for _ in range(runs):
        for name, call in calls.items():
            taken[name].append(milliseconds(call, runs=1, warm_up=0))
    return {name: statistics.median(times) for name, times in taken.items()}


def random_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A detector of a row with fresh weights, on the GPU."""
    import vitadapter_zoo

    torch.manual_seed(0)
    return vitadapter_zoo.load(name, pretrained=False, device="cuda", dtype=dtype)


def standin_model(name: str, dtype: torch.dtype = torch.float32, device: str = "cuda") -> Any:
    """A detector of a row with the stand-in weights of the reference outputs."""
    import standins

    from vitadapter_zoo import get_row
    from vitadapter_zoo.models import build

    model = build(get_row(name))
    model.load_state_dict(standins.state_dict(name), strict=True)
    return model.to(device=device, dtype=dtype).eval()


def device() -> Found:
    """What the GPU is and how fast it copies and multiplies."""
    import torchvision

    properties = torch.cuda.get_device_properties(0)
    big = torch.empty(2**30, device="cuda")
    copy = torch.empty_like(big)
    found: Found = {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "copy_tb_s": round(8 * 2**30 / milliseconds(lambda: copy.copy_(big)) / 1e9, 2),
    }
    del big, copy
    for label, dtype, tf32 in (
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bfloat16", torch.bfloat16, False),
    ):
        set_tf32(tf32)
        side = 8192 if label != "float32" else 4096
        a, b = (torch.randn(side, side, device="cuda").to(dtype) for _ in range(2))
        found[f"{label}_tflop_s"] = round(2 * side**3 / milliseconds(lambda: a @ b) / 1e9, 1)  # noqa: B023
    return found


def build() -> Found:
    """Compile the operators for this device into the cache."""
    from vitadapter_zoo.ops.build import build as compile_operators
    from vitadapter_zoo.ops.build import cuda_architectures

    return {"libraries": [path.name for path in compile_operators()], "for": cuda_architectures()}


def operator() -> Found:
    """The operator against float64 on the CPU: forward, backward, plain and fused."""
    from operators import random_arguments

    from vitadapter_zoo.ops import ms_deform_attn, ms_deform_attn_fused, reference
    from vitadapter_zoo.ops.library import check, implementation

    where = implementation("cuda")
    if not where.compiled:
        raise RuntimeError(where.why)
    found: Found = {"library": where.why, "check_error": f"{check(torch.device('cuda')):.1e}"}
    tolerances = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
    worst: dict[str, float] = {}
    shapes_of_levels = {1: [(13, 9)], 2: [(9, 7), (3, 1)], 3: [(12, 10), (6, 5), (3, 3)], 4: [(8, 8), (4, 4), (2, 2), (1, 1)]}
    cases = 0
    for dtype, tolerance in tolerances.items():
        for channels in (1, 3, 4, 8, 16, 20, 24, 32, 48, 64, 80, 128):
            for levels, points in ((1, 4), (2, 3), (3, 4), (4, 4)):
                given = random_arguments(
                    channels, shapes_of_levels[levels], batch=2, queries=37, heads=3,
                    channels=channels, points=points, dtype=dtype,
                )  # fmt: skip
                value, shapes, locations, weights = given
                locations.view(-1)[3] = float("nan")
                points_at = torch.rand(37, 2, dtype=locations.dtype)
                # Gradients jump where a location crosses a pixel's centre, so rounding must not
                # decide on which side it lies: a quarter of a pixel away from all of them.
                sizes = shapes.flip(-1)[:, None].to(locations.dtype)
                targets = torch.randint(-1, 12, locations.shape) + torch.randint(0, 2, locations.shape) / 2 + 0.75
                offsets = (targets - points_at[:, None, None, None] * sizes).to(dtype)
                logits = torch.randn_like(weights.float()).to(dtype)
                grad = torch.randn(2, 37, 3 * channels).to(dtype)
                for kind, arguments in (
                    ("plain", (value, shapes, locations, weights)),
                    ("fused", (value, shapes, points_at, offsets, logits)),
                ):
                    mine = _with_gradients(
                        ms_deform_attn if kind == "plain" else ms_deform_attn_fused,
                        [tensor.cuda() for tensor in arguments], grad.cuda(),
                    )  # fmt: skip
                    wide = [x if x.dtype == torch.int64 else x.double() for x in arguments]
                    composed = (
                        reference.ms_deform_attn
                        if kind == "plain"
                        else lambda v, s, at, off, log: reference.ms_deform_attn(
                            v, s, *reference.locate(s, at, off, log)
                        )
                    )
                    right = _with_gradients(composed, wide, grad.double())
                    for got, expected in zip(mine, right, strict=True):
                        got, expected = got.cpu().double().nan_to_num(0), expected.nan_to_num(0)
                        error = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-9))
                        key = f"{kind} {str(dtype)[6:]}"
                        worst[key] = max(worst.get(key, 0.0), error)
                        if not error <= tolerance:
                            raise AssertionError(f"{key}, {channels} channels, {levels} levels, {points} points: {error:.1e}")
                    cases += 1
    found["worst_relative_error"] = {key: f"{value:.1e}" for key, value in worst.items()}
    found["cases"] = cases
    value, shapes, locations, weights = random_arguments(0, [(4, 6), (2, 3), (1, 1)], queries=5)
    tests = {"test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"}
    arguments = (value.cuda().requires_grad_(), shapes.cuda(), locations.cuda(), weights.cuda())
    torch.library.opcheck(torch.ops.vitadapter_zoo.ms_deform_attn, arguments, test_utils=tuple(tests))
    found["opcheck"] = "passed"
    torch.use_deterministic_algorithms(True)
    try:
        ms_deform_attn(*arguments).sum().backward()
        raise AssertionError("deterministic mode did not alert")
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        found["deterministic_mode"] = "alerts"
    return found


def _with_gradients(
    operator: Callable[..., Tensor], arguments: list[Tensor], grad: Tensor
) -> list[Tensor]:
    """The output and the gradients of value and of the last two arguments."""
    leaves = [
        tensor.detach().clone().requires_grad_() if index in (0, len(arguments) - 2, len(arguments) - 1) else tensor
        for index, tensor in enumerate(arguments)
    ]
    output = operator(*leaves)
    wanted = [leaves[0], leaves[-2], leaves[-1]]
    return [output.detach(), *torch.autograd.grad(output, wanted, grad)]


def sanitizer() -> Found:
    """A small case of every kernel under compute-sanitizer."""
    import shutil
    import subprocess

    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return {"skipped": "compute-sanitizer is not installed"}
    program = (
        "import torch\n"
        "from vitadapter_zoo.ops.library import implementation, check\n"
        "assert implementation('cuda').compiled, implementation('cuda').why\n"
        "print('error', check(torch.device('cuda')))\n"
    )
    done = subprocess.run(
        [tool, "--tool", "memcheck", sys.executable, "-c", program],
        capture_output=True, text=True, timeout=80,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line or line.startswith("error")]
    if done.returncode != 0 or not any("ERROR SUMMARY: 0 errors" in line for line in lines):
        raise RuntimeError(" ".join(lines) or done.stderr[-300:])
    return {"memcheck": lines}


def parity() -> Found:
    """Four rows against the stored outputs of the original, with TF32 off."""
    from parity import compare

    set_tf32(False)
    found: Found = {"rows": []}
    failures = []
    for name in ROWS:
        report = compare(standin_model(name))
        failures += [f"{name}: {failure}" for failure in report.failures()]
        found["rows"].append(
            f"{name}: features {max(report.features.values()):.1e}, proposals {report.proposals:.4f}, "
            f"unmatched {report.unmatched}, mask IoU {report.mask_iou:.5f}"
        )
    if failures:
        raise AssertionError("; ".join(failures) + f" | {found['rows']}")
    return found


def precision() -> Found:
    """What TF32, bfloat16 and float16 do to the detections of T with stand-in weights."""
    from torchvision.ops import box_iou

    set_tf32(False)
    right = standin_model("adapter-t-deit-3x").predict(str(PHOTO))[0]
    found: Found = {"detections": len(right)}
    for label, dtype, tf32 in (
        ("tf32", torch.float32, True),
        ("bfloat16", torch.bfloat16, False),
        ("float16", torch.float16, False),
    ):
        set_tf32(tf32)
        mine = standin_model("adapter-t-deit-3x", dtype).predict(str(PHOTO))[0]
        near = (box_iou(right.boxes, mine.boxes) > 0.9) & (right.labels[:, None] == mine.labels)
        found[label] = f"{len(mine)} detections, {int(near.any(1).sum())} of float32's with IoU > 0.9"
    return found


def predict() -> Found:
    """Predict as a user does; the masks equal those that the CPU pastes."""
    from vitadapter_zoo.ops import paste_masks

    set_tf32(False)
    model = standin_model("adapter-t-deit-3x")
    item = model.preprocess(str(PHOTO))
    with torch.inference_mode():
        found = model.detect([item])[0]
        on_gpu = paste_masks(found.mask_probabilities, found.boxes, found.size, 0.5).cpu()
        on_cpu = paste_masks(found.mask_probabilities.cpu(), found.boxes.cpu(), found.size, 0.5)
    differing = int((on_gpu != on_cpu).sum())
    batched = model.predict([str(PHOTO)] * 3, batch_size=3)
    return {
        "detections": len(found.boxes),
        "differing_mask_pixels": f"{differing} of {on_cpu.numel()}",
        "batch_of_three": [len(detections) for detections in batched],
    }


def operator_speed() -> Found:
    """The operator beside grid_sample, torch.compile of it, and transformers' module."""
    import ms_deform_attn as bench

    from vitadapter_zoo.ops import ms_deform_attn, ms_deform_attn_fused, reference
    from vitadapter_zoo.ops.reference import locate

    found: Found = {"forward": [], "backward": []}
    for dtype in (torch.float32, torch.bfloat16):
        for size in ("T", "L"):
            for kind in ("injector", "extractor"):
                value, shapes, locations, weights = (x.cuda() for x in bench.arguments(size, kind, dtype))
                points = locations[0, :, 0, 0, 0].contiguous()
                offsets = (torch.randn_like(locations) * bench.SPREAD).to(dtype)
                logits = weights.float().log().to(dtype)
                plain = (value, shapes, locations, weights)
                fused = (value, shapes, points, offsets, logits)
                compiled = torch.compile(reference.ms_deform_attn)
                levels = shapes.tolist()
                with torch.no_grad():
                    taken = in_turn(
                        {
                            "fused": lambda a=fused: ms_deform_attn_fused(*a),
                            "plain": lambda a=plain: ms_deform_attn(*a),
                            "fused_composed": lambda a=fused: ms_deform_attn(a[0], a[1], *_located(a, dtype, locate)),
                            "grid_sample": lambda a=plain: reference.ms_deform_attn(*a),
                        }
                        | ({"compiled_grid_sample": lambda a=plain: compiled(*a)} if size == "T" else {})
                    )
                read = value.numel() * value.element_size() + value.shape[0] * locations.shape[1] * value[0, 0].numel() * value.element_size() + (offsets.numel() + logits.numel()) * offsets.element_size()
                line = f"{size} {kind} {str(dtype)[6:]} {levels if False else ''}".strip()
                line += "".join(f", {name} {ms * 1e3:.0f} us" for name, ms in taken.items())
                line += f", least traffic {read / taken['fused'] / 1e6:.0f} GB/s"
                found["forward"].append(line)
                grads = {}
                for name, operator, given in (
                    ("fused", ms_deform_attn_fused, fused),
                    ("plain", ms_deform_attn, plain),
                    ("grid_sample", reference.ms_deform_attn, plain),
                ):
                    leaves = [
                        x.detach().requires_grad_() if index in (0, len(given) - 2, len(given) - 1) else x
                        for index, x in enumerate(given)
                    ]
                    output = operator(*leaves)
                    grad = torch.randn_like(output)
                    wanted = [leaves[0], leaves[-2], leaves[-1]]
                    grads[name] = lambda o=output, w=wanted, g=grad: torch.autograd.grad(o, w, g, retain_graph=True)
                taken = in_turn(grads, runs=9)
                found["backward"].append(
                    f"{size} {kind} {str(dtype)[6:]}" + "".join(f", {name} {ms * 1e3:.0f} us" for name, ms in taken.items())
                )
    return found


def _located(given: tuple[Tensor, ...], dtype: torch.dtype, locate: Callable[..., Any]) -> Any:
    locations, weights = locate(*given[1:])
    return locations, weights.to(dtype)


def image_speed() -> Found:
    """Images per second of whole detectors, one image at a time and in batches."""
    import original

    found: Found = {"images_per_second": []}
    for size, name in SIZES.items():
        for label, dtype, tf32 in (
            ("float32", torch.float32, False),
            ("tf32", torch.float32, True),
            ("bfloat16", torch.bfloat16, False),
            ("float16", torch.float16, False),
        ):
            set_tf32(tf32)
            model = random_model(name, dtype)
            item = model.preprocess(str(PHOTO))
            rates = []
            with torch.inference_mode():
                for batch in (1, 8):
                    runs = 8 if size in "TS" else 4
                    ms = milliseconds(lambda b=batch: model.detect([item] * b), runs=runs, warm_up=2)  # noqa: B023
                    rates.append(f"batch {batch}: {batch / ms * 1e3:.1f}")
                pixels = item.tensor.to("cuda", dtype)
                parts = milliseconds(lambda: model.neck(model.backbone(pixels)), runs=8, warm_up=1)  # noqa: B023
                rates.append(f"backbone and neck {parts:.1f} ms")
                if dtype == torch.float32:
                    peer = milliseconds(
                        lambda: original.neck(model.neck, original.backbone(model.backbone, pixels)),  # noqa: B023
                        runs=8,
                        warm_up=1,
                    )
                    rates.append(f"original arrangement {peer:.1f} ms")
            found["images_per_second"].append(f"{size} {label}: {', '.join(rates)}")
            del model
            torch.cuda.empty_cache()
    return found


def training_speed() -> Found:
    """Forward and backward of T's backbone and neck on two 512 x 512 images."""
    found: Found = {}
    set_tf32(True)
    model = random_model("adapter-t-deit-3x").train()
    image = torch.randn(2, 3, 512, 512, device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            maps = model.neck(model.backbone(image))
            loss = sum(level.float().square().mean() for level in maps)
        loss.backward()
        model.zero_grad()

    found["backbone_and_neck_ms"] = round(milliseconds(step, runs=10), 1)
    found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def profile() -> Found:
    """Kernels, synchronizations and the busy share of one image of T in bfloat16."""
    model = random_model("adapter-t-deit-3x", torch.bfloat16)
    item = model.preprocess(str(PHOTO))
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.inference_mode():
        for _ in range(3):
            model.detect([item])
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profiler:
            model.detect([item])
            torch.cuda.synchronize()
    events = profiler.events()
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    span = max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
    busy = sum(e.time_range.elapsed_us() for e in kernels)
    names = [e.name for e in events]
    slowest: dict[str, float] = {}
    for event in kernels:
        slowest[event.name] = slowest.get(event.name, 0) + event.time_range.elapsed_us()
    top = sorted(slowest.items(), key=lambda pair: -pair[1])[:12]
    return {
        "kernels": len(kernels),
        "synchronizations": sum("Synchronize" in name for name in names),
        "copies": sum("emcpy" in e.name for e in kernels),
        "busy_share": round(busy / span, 2),
        "busy_ms": round(busy / 1e3, 2),
        "span_ms": round(span / 1e3, 2),
        "slowest": [f"{us:.0f} us {name[:80]}" for name, us in top],
    }


SECTIONS: dict[str, Callable[[], Found]] = {
    function.__name__: function
    for function in (
        device, build, operator, sanitizer, parity, precision, predict,
        operator_speed, image_speed, training_speed, profile,
    )
}  # fmt: skip

if __name__ == "__main__":
    if not torch.cuda.is_available():
        print(json.dumps({"skipped": "no CUDA device"}))
    else:
        print(json.dumps(SECTIONS[sys.argv[1]]()))
