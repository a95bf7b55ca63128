"""The sections of ``gpu_check.py`` that measure speed."""

from collections.abc import Callable
from functools import partial

import torch
from gpu_common import (
    PHOTO,
    Found,
    Setting,
    differentiable,
    in_parts,
    in_turn,
    milliseconds,
    random_model,
    set_tf32,
)
from torch import Tensor

from vitadapter_zoo import MaskRCNN
from vitadapter_zoo.images import NetworkInput
from vitadapter_zoo.models.graphs import CALLS_BEFORE
from vitadapter_zoo.ops import ms_deform_attn, ms_deform_attn_fused, reference
from vitadapter_zoo.ops.reference import locate

SIZES = {
    "T": "adapter-t-deit-3x",
    "S": "adapter-s-deit-3x",
    "B": "adapter-b-deit-3x",
    "L": "adapter-l-augreg-3x",
}
Call = Callable[[], object]


def attention(setting: Setting) -> Found:
    """Find which kernel computes T's global and windowed attention; half precision: flash's."""
    from vitadapter_zoo.models.vit import self_attention

    def kernels(dtype: torch.dtype, length: int) -> list[str]:
        qkv = torch.randn(4, length, 3 * 192, device=setting.device).to(dtype)
        with torch.inference_mode():
            names = _kernel_names(setting, partial(self_attention, qkv, 3))
        if setting.on_gpu and dtype != torch.float32 and not any("flash" in x for x in names):
            raise AssertionError(f"no flash kernel among {names}")
        return names

    return in_parts(
        {
            f"{label}, {length} tokens": partial(kernels, dtype, length)
            for label, (dtype, _) in setting.precisions.items()
            for length in (196, 400 if setting.quick else 3800)
        }
    )


def _kernel_names(setting: Setting, call: Call) -> list[str]:
    """Return the kernels of a call; on the CPU the operators."""
    call()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if setting.on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        setting.synchronize()
    kind = "CUDA" if setting.on_gpu else "CPU"
    names = {event.name[:90] for event in profiler.events() if event.device_type.name == kind}
    return sorted(names)


def operator_speed(setting: Setting) -> Found:
    """Compare the operator with grid_sample, in eager mode and with torch.compile.

    Forward and backward times are between two events around a call, including Python's overhead.
    ``kernel`` is the time per call in a CUDA graph of 20 calls, without Python's overhead.
    """
    sizes = ("T",) if setting.quick else ("T", "L")
    dtypes = (torch.float32,) if setting.quick else (torch.float32, torch.bfloat16)
    return in_parts(
        {
            f"{size} {kind} {str(dtype)[6:]}": partial(_operator_times, setting, size, kind, dtype)
            for dtype in dtypes
            for size in sizes
            for kind in ("injector", "extractor")
        }
    )


def _operator_times(setting: Setting, size: str, kind: str, dtype: torch.dtype) -> Found:
    plain, fused = _operator_arguments(setting, size, kind, dtype)
    calls = _forward_calls(plain, fused, compiled=size == "T" and setting.on_gpu)
    with torch.no_grad():
        forward = in_turn(setting, calls)
        kernels = {
            name: _in_graph(setting, calls[name]) for name in ("fused", "plain", "grid_sample")
        }
    backward = in_turn(setting, _backward_calls(plain, fused), 9)
    return {"forward": _line(forward), "kernel": _line(kernels), "backward": _line(backward)}


def _operator_arguments(
    setting: Setting, size: str, kind: str, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Create arguments of the plain and of the fused operator."""
    import ms_deform_attn as benchmark

    value, shapes, locations, weights = (
        tensor.to(setting.device) for tensor in benchmark.arguments(size, kind, dtype)
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


def _in_graph(setting: Setting, call: Call, times: int = 20) -> float:
    """Measure the milliseconds per call in a CUDA graph of ``times`` calls; a call on the CPU."""
    if not setting.on_gpu:
        return milliseconds(setting, call, runs=1)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return milliseconds(setting, graph.replay, runs=10) / times


def _line(taken: dict[str, float]) -> str:
    return ", ".join(f"{name} {ms * 1e3:.0f} us" for name, ms in taken.items())


def image_speed(setting: Setting) -> Found:
    """Measure images per second of whole detectors, single images and batches, and the original."""
    sizes = {"T": SIZES["T"]} if setting.quick else SIZES
    return in_parts(
        {
            f"{size} {label}": partial(_image_rates, setting, size, dtype, allow_tf32=tf32)
            for size in sizes
            for label, (dtype, tf32) in setting.precisions.items()
        }
    )


def _image_rates(setting: Setting, size: str, dtype: torch.dtype, *, allow_tf32: bool) -> str:
    set_tf32(allow_tf32)  # for the parts that are called without `detect`
    model = random_model(setting, SIZES[size], dtype, allow_tf32=allow_tf32)
    item = model.preprocess(str(PHOTO))
    runs = 8 if size in "TS" else 4
    with torch.inference_mode():
        rates = [_rate(setting, model, [item] * batch, runs) for batch in (1, 8)]
        rates += [_rate(setting, model, [item] * n, runs, repeated=True) for n in (1, 8)]
        rates += _feature_times(setting, model, item.tensor.to(setting.device, dtype))
    del model
    if setting.on_gpu:
        torch.cuda.empty_cache()
    return ", ".join(rates)


def _rate(
    setting: Setting, model: MaskRCNN, items: list[NetworkInput], runs: int, repeated: bool = False
) -> str:
    call = partial(model.detect, items, repeated=repeated)
    ms = milliseconds(setting, call, runs=runs, warm_up=CALLS_BEFORE + 1 if repeated else 2)
    kind = " with a graph" if repeated else ""
    return f"batch {len(items)}{kind}: {len(items) / ms * 1e3:.1f}/s"


def _feature_times(setting: Setting, model: MaskRCNN, pixels: Tensor) -> list[str]:
    """Measure the milliseconds of backbone and neck, ours and in the original arrangement."""
    import original

    def ours() -> object:
        return model.neck(model.backbone(pixels))

    def theirs() -> object:
        return original.neck(model.neck, original.backbone(model.backbone, pixels))

    lines = [f"backbone and neck {milliseconds(setting, ours, runs=8, warm_up=1):.1f} ms"]
    if pixels.dtype == torch.float32:
        ms = milliseconds(setting, theirs, runs=8, warm_up=1)
        lines.append(f"original arrangement {ms:.1f} ms")
    return lines


def training_speed(setting: Setting) -> Found:
    """Measure forward and backward of T's backbone and neck: 2 images, 512 x 512, bfloat16."""
    set_tf32(True)
    model = random_model(setting, SIZES["T"]).train()
    side = 64 if setting.quick else 512
    image = torch.randn(2, 3, side, side, device=setting.device)

    def step() -> None:
        with torch.autocast(setting.device, torch.bfloat16):
            maps = model.neck(model.backbone(image))
            loss = torch.stack([level.float().square().mean() for level in maps]).sum()
        loss.backward()
        model.zero_grad()

    found: Found = {"backbone_and_neck_ms": round(milliseconds(setting, step, runs=10), 1)}
    if setting.on_gpu:
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def profile(setting: Setting) -> Found:
    """Count kernels and synchronizations of T on an image in bfloat16, without and with a graph."""
    model = random_model(setting, SIZES["T"], torch.bfloat16)
    item = model.preprocess(str(PHOTO))
    return in_parts(
        {
            "without_a_graph": partial(_profile_of, setting, partial(model.detect, [item])),
            "with_a_graph": partial(
                _profile_of, setting, partial(model.detect, [item], repeated=True)
            ),
        }
    )


def _profile_of(setting: Setting, call: Call) -> Found:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if setting.on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.inference_mode():
        for _ in range(CALLS_BEFORE + 2):
            call()
        setting.synchronize()
        with torch.profiler.profile(activities=activities) as profiler:
            call()
            setting.synchronize()
    events = list(profiler.events())
    kind = "CUDA" if setting.on_gpu else "CPU"
    kernels = [event for event in events if event.device_type.name == kind]
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
