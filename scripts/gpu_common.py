"""Helpers for the sections of ``gpu_check.py``: settings, timing, precision and detectors."""

import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vitadapter_zoo
from vitadapter_zoo import MaskRCNN
from vitadapter_zoo.catalog import COCO_CLASSES
from vitadapter_zoo.models import build

Found = dict[str, Any]
DATA = Path(__file__).resolve().parents[1] / "tests" / "data"
PHOTO = DATA / "rocket.jpg"
SMALL = "adapter-n-emoji"  # the network of a quick run


@dataclass(frozen=True)
class Setting:
    """How the sections run.

    Attributes:
        device: ``"cuda"``, or ``"cpu"`` to execute the script's own code where there is no GPU.
        quick: small networks and few repetitions; the numbers mean nothing.
    """

    device: str = "cuda"
    quick: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device != "cpu"

    @property
    def precisions(self) -> dict[str, tuple[torch.dtype, bool]]:
        """The dtypes to compute in, each with whether TF32 is allowed; the CPU lacks two."""
        found = {
            "float32": (torch.float32, False),
            "tf32": (torch.float32, True),
            "bfloat16": (torch.bfloat16, False),
            "float16": (torch.float16, False),
        }
        return found if self.on_gpu else {name: found[name] for name in ("float32", "bfloat16")}

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.on_gpu:
            torch.cuda.synchronize()


def in_parts(parts: Mapping[str, Callable[[], object]]) -> Found:
    """Return the result of each part; a failure does not keep the others from running.

    The failures are under ``error``, with their tracebacks under ``log``.
    """
    found: Found = {}
    errors: list[str] = []
    log: list[str] = []
    for name, part in parts.items():
        try:
            found[name] = part()
        except Exception as error:  # the report is what a failure is for
            lines = str(error).strip().splitlines() or [type(error).__name__]
            errors.append(f"{name}: {lines[0]}")
            log += traceback.format_exc().splitlines()[-12:]
    return found | ({"error": "; ".join(errors), "log": log} if errors else {})


def set_tf32(allowed: bool) -> None:
    """Turn TF32 on or off in convolutions and matrix products."""
    precision = "tf32" if allowed else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]


def milliseconds(
    setting: Setting, call: Callable[[], object], runs: int = 20, warm_up: int = 3
) -> float:
    """Measure the median time of a call in ms: on a GPU between two events."""
    if setting.quick:
        runs, warm_up = min(runs, 2), min(warm_up, 1)
    for _ in range(warm_up):
        call()
    setting.synchronize()
    taken = []
    for _ in range(runs):
        if not setting.on_gpu:
            started = time.perf_counter()
            call()
            taken.append(1e3 * (time.perf_counter() - started))
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    return statistics.median(taken)


def in_turn(
    setting: Setting, calls: dict[str, Callable[[], object]], runs: int = 15
) -> dict[str, float]:
    """Measure the median time of each call in ms; every round measures all calls."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        milliseconds(setting, call, runs=1, warm_up=2)
    for _ in range(1 if setting.quick else runs):
        for name, call in calls.items():
            taken[name].append(milliseconds(setting, call, runs=1, warm_up=0))
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
    setting: Setting, name: str, dtype: torch.dtype = torch.float32, *, allow_tf32: bool = False
) -> MaskRCNN:
    """Build a row's detector with random weights; a quick run builds a small one."""
    torch.manual_seed(0)
    if setting.quick:
        model = small_model(setting, dtype)
    else:
        model = vitadapter_zoo.load(name, pretrained=False, device=setting.device, dtype=dtype)
    model.allow_tf32 = allow_tf32
    return model


def small_model(setting: Setting, dtype: torch.dtype = torch.float32) -> MaskRCNN:
    """Build the smallest network with random weights, for small images."""
    row = replace(vitadapter_zoo.get_row(SMALL), input_size=(128, 96))
    model = build(row, COCO_CLASSES)
    with torch.no_grad():  # to have some detections
        model.get_parameter("roi_head.bbox_head.fc_cls.bias")[:2] += 3
    return model.to(device=setting.device, dtype=dtype).eval()


def standin_model(
    setting: Setting, name: str, dtype: torch.dtype = torch.float32, *, allow_tf32: bool = False
) -> MaskRCNN:
    """Build a row's detector with the stand-in weights of the reference outputs."""
    import standins

    model = build(vitadapter_zoo.get_row(name))
    model.load_state_dict(standins.state_dict(name))
    model.allow_tf32 = allow_tf32
    return model.to(device=setting.device, dtype=dtype).eval()


def photo_model(
    setting: Setting, dtype: torch.dtype = torch.float32, *, allow_tf32: bool = False
) -> MaskRCNN:
    """Build T with stand-in weights, which detects things in the photo; or the small network."""
    if setting.quick:
        return random_model(setting, SMALL, dtype, allow_tf32=allow_tf32)
    return standin_model(setting, "adapter-t-deit-3x", dtype, allow_tf32=allow_tf32)
