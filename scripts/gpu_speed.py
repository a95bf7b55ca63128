"""The sections of ``gpu_check.py`` that measure speed."""

from collections.abc import Callable
from functools import partial

import torch
from gpu_common import PHOTO, Found, differentiable, in_turn, milliseconds, random_model, set_tf32
from torch import Tensor

from vitadapter_zoo import MaskRCNN
from vitadapter_zoo.images import NetworkInput
from vitadapter_zoo.ops import ms_deform_attn, ms_deform_attn_fused, reference
from vitadapter_zoo.ops.reference import locate

SIZES = {
    "T": "adapter-t-deit-3x",
    "S": "adapter-s-deit-3x",
    "B": "adapter-b-deit-3x",
    "L": "adapter-l-augreg-3x",
}
PRECISIONS = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
}
Call = Callable[[], object]


def operator_speed() -> Found:
    """Compare the operator with grid_sample, in eager mode and with torch.compile.

    Forward and backward times are between two events around a call, including Python's overhead.
    ``kernel`` is the time per call in a CUDA graph of 20 calls, without Python's overhead.
    """
    found: Found = {"forward": [], "kernel": [], "backward": []}
    for dtype in (torch.float32, torch.bfloat16):
        for size in ("T", "L"):
            for kind in ("injector", "extractor"):
                plain, fused = _operator_arguments(size, kind, dtype)
                label = f"{size} {kind} {str(dtype)[6:]}"
                calls = _forward_calls(plain, fused, compiled=size == "T")
                with torch.no_grad():
                    found["forward"].append(_line(label, in_turn(calls)))
                    kernels = {name: calls[name] for name in ("fused", "plain", "grid_sample")}
                    found["kernel"].append(
                        _line(label, {name: _in_graph(call) for name, call in kernels.items()})
                    )
                found["backward"].append(_line(label, in_turn(_backward_calls(plain, fused), 9)))
    return found


def _operator_arguments(
    size: str, kind: str, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Create arguments of the plain and of the fused operator."""
    import ms_deform_attn as benchmark

    value, shapes, locations, weights = (
        tensor.cuda() for tensor in benchmark.arguments(size, kind, dtype)
    )
    points = locations[0, :, 0, 0, 0].contiguous()
    offsets = (torch.randn_like(locations) * benchmark.SPREAD).to(dtype)
    logits = weights.float().log().to(dtype)
    return (value, shapes, locations, weights), (value, shapes, points, offsets, logits)


def _forward_calls(
    plain: tuple[Tensor, ...], fused: tuple[Tensor, ...], *, compiled: bool
) -> dict[str, Call]:
    def unfused() -> Tensor:
        value, shapes, *rest = fused
        locations, weights = locate(shapes, *rest)
        return ms_deform_attn(value, shapes, locations, weights.to(value.dtype))

    # spatial_shapes.tolist() waits for the device, which is not possible in a CUDA graph.
    on_cpu = (plain[0], plain[1].cpu(), *plain[2:])
    calls: dict[str, Call] = {
        "fused": partial(ms_deform_attn_fused, *fused),
        "plain": partial(ms_deform_attn, *plain),
        "softmax, then plain": unfused,
        "grid_sample": partial(reference.ms_deform_attn, *on_cpu),
    }
    if compiled:
        calls["compiled grid_sample"] = partial(torch.compile(reference.ms_deform_attn), *on_cpu)
    return calls


def _backward_calls(plain: tuple[Tensor, ...], fused: tuple[Tensor, ...]) -> dict[str, Call]:
    calls: dict[str, Call] = {}
    for name, operator, given in (
        ("fused", ms_deform_attn_fused, fused),
        ("plain", ms_deform_attn, plain),
        ("grid_sample", reference.ms_deform_attn, plain),
    ):
        leaves, wanted = differentiable(given)
        output = operator(*leaves)
        grad = torch.randn_like(output)
        calls[name] = partial(torch.autograd.grad, output, wanted, grad, retain_graph=True)
    return calls


def _in_graph(call: Call, times: int = 20) -> float:
    """Measure the milliseconds per call in a CUDA graph of ``times`` calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return milliseconds(graph.replay, runs=10) / times


def _line(label: str, taken: dict[str, float]) -> str:
    return f"{label}: " + ", ".join(f"{name} {ms * 1e3:.0f} us" for name, ms in taken.items())


def image_speed() -> Found:
    """Measure images per second of whole detectors, single images and batches, and the original."""
    found: Found = {"images_per_second": []}
    for size, name in SIZES.items():
        for label, (dtype, tf32) in PRECISIONS.items():
            set_tf32(tf32)  # for the parts that are called without `detect`
            model = random_model(name, dtype, allow_tf32=tf32)
            item = model.preprocess(str(PHOTO))
            with torch.inference_mode():
                rates = [_rate(model, item, batch, 8 if size in "TS" else 4) for batch in (1, 8)]
                rates += _feature_times(model, item.tensor.to("cuda", dtype))
            found["images_per_second"].append(f"{size} {label}: {', '.join(rates)}")
            del model
            torch.cuda.empty_cache()
    return found


def _rate(model: MaskRCNN, item: NetworkInput, batch: int, runs: int) -> str:
    ms = milliseconds(partial(model.detect, [item] * batch), runs=runs, warm_up=2)
    return f"batch {batch}: {batch / ms * 1e3:.1f}"


def _feature_times(model: MaskRCNN, pixels: Tensor) -> list[str]:
    """Measure the milliseconds of backbone and neck, ours and in the original arrangement."""
    import original

    def ours() -> object:
        return model.neck(model.backbone(pixels))

    def theirs() -> object:
        return original.neck(model.neck, original.backbone(model.backbone, pixels))

    lines = [f"backbone and neck {milliseconds(ours, runs=8, warm_up=1):.1f} ms"]
    if pixels.dtype == torch.float32:
        lines.append(f"original arrangement {milliseconds(theirs, runs=8, warm_up=1):.1f} ms")
    return lines


def training_speed() -> Found:
    """Measure forward and backward of T's backbone and neck: 2 images, 512 x 512, bfloat16."""
    set_tf32(True)
    model = random_model("adapter-t-deit-3x").train()
    image = torch.randn(2, 3, 512, 512, device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            maps = model.neck(model.backbone(image))
            loss = torch.stack([level.float().square().mean() for level in maps]).sum()
        loss.backward()
        model.zero_grad()

    return {
        "backbone_and_neck_ms": round(milliseconds(step, runs=10), 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def profile() -> Found:
    """Count kernels and synchronizations of T on an image in bfloat16; measure the busy share."""
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
    kernels = [event for event in events if event.device_type.name == "CUDA"]
    span = max(event.time_range.end for event in events)
    span -= min(event.time_range.start for event in events)
    times: dict[str, float] = {}
    for event in kernels:
        times[event.name] = times.get(event.name, 0) + event.time_range.elapsed_us()
    busy = sum(times.values())
    slowest = sorted(times.items(), key=lambda pair: -pair[1])[:12]
    return {
        "kernels": len(kernels),
        "synchronizations": sum("Synchronize" in event.name for event in events),
        "copies": sum("emcpy" in event.name for event in kernels),
        "busy_share": round(busy / span, 2),
        "busy_ms": round(busy / 1e3, 2),
        "span_ms": round(span / 1e3, 2),
        "slowest": [f"{us:.0f} us {name[:80]}" for name, us in slowest],
    }
