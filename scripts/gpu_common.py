"""Helpers for the sections of ``gpu_check.py``: timing, precision and detectors."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vitadapter_zoo
from vitadapter_zoo import MaskRCNN
from vitadapter_zoo.models import build

Found = dict[str, Any]
PHOTO = Path(__file__).resolve().parents[1] / "tests" / "data" / "rocket.jpg"


def set_tf32(allowed: bool) -> None:
    """Turn TF32 on or off in convolutions and matrix products."""
    precision = "tf32" if allowed else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]


def milliseconds(call: Callable[[], object], runs: int = 20, warm_up: int = 3) -> float:
    """Measure the median time of a call between two CUDA events, in ms."""
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
    """Measure the median time of each call in ms; every round measures all calls."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        milliseconds(call, runs=1, warm_up=2)
    for _ in range(runs):
        for name, call in calls.items():
            taken[name].append(milliseconds(call, runs=1, warm_up=0))
    return {name: statistics.median(times) for name, times in taken.items()}


def differentiable(arguments: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return an operator's arguments, and those that get gradients: the first and the last two."""
    last = len(arguments) - 1
    leaves = [
        tensor.detach().requires_grad_() if index in (0, last - 1, last) else tensor
        for index, tensor in enumerate(arguments)
    ]
    return leaves, [leaves[0], leaves[-2], leaves[-1]]


def random_model(
    name: str, dtype: torch.dtype = torch.float32, *, allow_tf32: bool = False
) -> MaskRCNN:
    """Build a row's detector with random weights on the GPU."""
    torch.manual_seed(0)
    model = vitadapter_zoo.load(name, pretrained=False, device="cuda", dtype=dtype)
    model.allow_tf32 = allow_tf32
    return model


def standin_model(
    name: str, dtype: torch.dtype = torch.float32, *, allow_tf32: bool = False
) -> MaskRCNN:
    """Build a row's detector on the GPU with the stand-in weights of the reference outputs."""
    import standins

    model = build(vitadapter_zoo.get_row(name))
    model.load_state_dict(standins.state_dict(name))
    model.allow_tf32 = allow_tf32
    return model.to(device="cuda", dtype=dtype).eval()
