"""Measure deformable attention, compared with other implementations.

    python benchmarks/ms_deform_attn.py [--runs 9] [--device cuda]

The shapes are those of the four network sizes for an 800 x 1216 image. Every round runs all
implementations, so that other load on the machine affects all of them. The script prints medians
and their ratio to this package's. ``composed`` computes the operator with grid_sample, which
PyTorch users have without an extension. The fallbacks of mmcv and transformers work the same way
and are measured if they are installed.

Bandwidth counts the values that the operator reads, four corners for every point. It is compared
with the bandwidth of summing a tensor as large as the values, which is the upper limit.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from vitadapter_zoo.ops import ms_deform_attn, ms_deform_attn_fused, reference
from vitadapter_zoo.ops.library import implementation
from vitadapter_zoo.ops.reference import locate

GRIDS = [(100, 152), (50, 76), (25, 38)]  # strides 8, 16 and 32
HEADS = {"T": (6, 32), "S": (6, 64), "B": (12, 32), "L": (16, 32)}  # (heads, channels per head)
POINTS = 4
# Distance in pixels of a location from its query. Newly initialised networks have 1 to 4.
SPREAD = 3.0

Operator = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def arguments(
    size: str, kind: str, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Create value, shapes, locations and weights for injectors or extractors of ``size``."""
    heads, channels = HEADS[size]
    levels, of_queries = (GRIDS, GRIDS[1:2]) if kind == "injector" else (GRIDS[1:2], GRIDS)
    centres = torch.cat([_centres(*grid) for grid in of_queries])
    pixels = sum(height * width for height, width in levels)
    shapes = torch.tensor(levels)
    grouped = (1, len(centres), heads, len(levels), POINTS)
    offsets = torch.randn(*grouped, 2) * SPREAD / shapes.flip(-1)[:, None]
    weights = torch.randn(grouped).flatten(3).softmax(-1).view(grouped)
    return (
        torch.randn(1, pixels, heads, channels).to(device, dtype),
        shapes.to(device),
        (centres[:, None, None, None] + offsets).to(device),
        weights.to(device, dtype),
    )


def _centres(height: int, width: int) -> Tensor:
    y, x = torch.meshgrid(
        (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij"
    )
    return torch.stack((x, y), -1).view(-1, 2)


def implementations() -> dict[str, Operator]:
    """Return the implementations by name, this package's first."""
    found: dict[str, Operator] = {"ours": ms_deform_attn, "composed": reference.ms_deform_attn}
    try:
        from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

        found["mmcv"] = multi_scale_deformable_attn_pytorch
    except ImportError:
        print("mmcv is not installed")
    try:
        from transformers.models.deformable_detr.modeling_deformable_detr import (
            MultiScaleDeformableAttention,
        )

        module = MultiScaleDeformableAttention()
        found["transformers"] = lambda v, s, loc, w: module(
            v, s, [(h, wide) for h, wide in s.tolist()], None, loc, w, 64
        )
    except ImportError:
        print("transformers is not installed")
    return found


def seconds_in_turn(
    calls: dict[str, Callable[[], object]], runs: int, device: str = "cpu"
) -> dict[str, float]:
    """Measure the median time of each call over ``runs`` rounds, after a warm-up call."""

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(runs + 1):
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            call()
            wait()
            if turn:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def measure_fused(size: str, kind: str, dtype: torch.dtype, runs: int, device: str) -> None:
    """Print a line for the fused operator, compared with separate softmax and scaling."""
    value, shapes, locations, weights = arguments(size, kind, dtype, device)
    points = locations[0, :, 0, 0, 0].contiguous()
    offsets = (torch.randn_like(locations) * SPREAD).to(dtype)
    logits = weights.log()

    def before(operator: Operator) -> Tensor:
        at, shares = locate(shapes, points, offsets, logits)
        return operator(value, shapes, at, shares.to(dtype))

    with torch.no_grad():
        taken = seconds_in_turn(
            {
                "ours": lambda: ms_deform_attn_fused(value, shapes, points, offsets, logits),
                "not fused": lambda: before(ms_deform_attn),
                "composed": lambda: before(reference.ms_deform_attn),
            },
            runs,
            device,
        )
    line = f"{size} {kind:<9} {str(dtype)[6:]:<8} fused    {taken['ours'] * 1e3:7.2f} ms"
    for name in ("not fused", "composed"):
        line += f"  {name} {taken[name] * 1e3:7.1f} ms = {taken[name] / taken['ours']:5.1f}x"
    print(line, flush=True)


def load_bandwidth(size: int, device: str) -> float:
    """Measure the bytes per second of summing ``size`` bytes of float32."""
    tensor = torch.ones(size // 4, device=device)
    return size / seconds_in_turn({"sum": tensor.sum}, 25, device)["sum"]


def measure(
    size: str,
    kind: str,
    dtype: torch.dtype,
    runs: int,
    operators: dict[str, Operator],
    device: str,
) -> dict[str, float]:
    """Print a line for each direction; return the ratio of ``composed`` to ours for each."""
    given = arguments(size, kind, dtype, device)
    # ``composed`` computes in the dtype of its locations. The other implementations need locations
    # in the dtype of the values.
    forward: dict[str, Callable[[], object]] = {}
    backward: dict[str, Callable[[], object]] = {}
    for name, operator in operators.items():
        value, shapes, locations, weights = given
        if name not in ("ours", "composed"):
            locations = locations.to(dtype)
        forward[name] = lambda o=operator, a=(value, shapes, locations, weights): o(*a)  # type: ignore[misc]
        leaves = [tensor.clone().requires_grad_() for tensor in (value, locations, weights)]
        output = operator(leaves[0], shapes, leaves[1], leaves[2])
        grad = torch.randn_like(output)
        backward[name] = lambda o=output, i=leaves, g=grad: torch.autograd.grad(  # type: ignore[misc]
            o, i, g, retain_graph=True
        )
    read = given[3].numel() * 4 * given[0].shape[3] * given[0].element_size()
    plain = load_bandwidth(given[0].numel() * given[0].element_size(), device)
    ratios = {}
    for direction, calls in (("forward", forward), ("backward", backward)):
        with torch.set_grad_enabled(direction == "backward"):
            taken = seconds_in_turn(calls, runs, device)
        line = f"{size} {kind:<9} {str(dtype)[6:]:<8} {direction:<8} {taken['ours'] * 1e3:7.2f} ms"
        for name, time_taken in taken.items():
            if name != "ours":
                line += f"  {name} {time_taken * 1e3:7.1f} ms = {time_taken / taken['ours']:5.1f}x"
        if direction == "forward":
            rate = read / taken["ours"]
            line += f"  {rate / 1e9:5.1f} GB/s, {rate / plain:4.2f} of plain loading"
        print(line, flush=True)
        ratios[direction] = taken["composed"] / taken["ours"]
    return ratios


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9, help="rounds of which the median is taken")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"{implementation(options.device).why}; {torch.get_num_threads()} threads")
    operators = implementations()
    for dtype in (torch.float32, torch.bfloat16):
        found = {
            (size, kind): measure(size, kind, dtype, options.runs, operators, options.device)
            for size in HEADS
            for kind in ("injector", "extractor")
        }
        for direction in ("forward", "backward"):
            ratios = [ratio[direction] for ratio in found.values()]
            print(
                f"{str(dtype)[6:]} {direction}: composed takes {min(ratios):.1f}x to "
                f"{max(ratios):.1f}x as long, median {statistics.median(ratios):.1f}x"
            )
        for size in HEADS:
            for kind in ("injector", "extractor"):
                measure_fused(size, kind, dtype, options.runs, options.device)
