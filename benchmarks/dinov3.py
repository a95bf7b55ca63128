"""DINOv3's adapter in plain PyTorch, and its measurement: `benchmarks/foundation.py --dinov3`.

`Plain` computes the arrangement of DINOv3's authors step by step, on the weights of this package's
`DINOv3Adapter`: its `MSDeformAttn` computes by grid_sample, as theirs does. It is measured as it is
("plain"), after `ops.accelerate` ("accelerated"), and beside `DINOv3Adapter` ("ours"), in turn in
one process. Times are processor times on the CPU, on one thread. The trunk is frozen and the same.

In bfloat16 the forward pass has all weights in bfloat16; the training step is under autocast.
Peak memory is that above the process's size before the step, after the heap is trimmed.
"""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import authors
import torch
import torch.nn.functional as F
from original import conv_ffn, convolved, normalised, sequence, to_map, upsampled
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import vitadapter_zoo
from vitadapter_zoo.models import DINOv3Adapter, adapter
from vitadapter_zoo.ops import accelerate

NAMES = {"S": "vit_small_patch16_dinov3_qkvb", "B": "vit_base_patch16_dinov3_qkvb"}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
VARIANTS = ("plain", "accelerated", "ours")
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}  # of the largest value


class Plain(nn.Module):
    """DINOv3's arrangement on the weights of a `DINOv3Adapter`, which it shares."""

    def __init__(self, network: DINOv3Adapter) -> None:
        super().__init__()
        self.network = network
        attentions = []
        for extractor in self._extractors():
            ours = extractor.attn
            dim = ours.output_proj.out_features
            ratio = ours.output_proj.in_features / dim
            attn = authors.MSDeformAttn(dim, 1, ours.heads, adapter.POINTS, ratio)
            for name, _ in list(attn.named_children()):
                layer = cast("nn.Linear", attn.get_submodule(name))
                layer.weight = ours.get_submodule(name).weight
                layer.bias = ours.get_submodule(name).bias
            attentions.append(attn)
        self.attentions = nn.ModuleList(attentions)

    def _extractors(self) -> list[Any]:
        return [
            extractor
            for interaction in cast("Any", self.network.interactions)
            for extractor in (interaction.extractor, *interaction.extra_extractors)
        ]

    def _extract(
        self, number: int, c: Tensor, x: Tensor, points: Tensor, grids: list[tuple[int, int]]
    ) -> Tensor:
        extractor = self._extractors()[number]
        shapes = torch.tensor([grids[1]], device=c.device)
        attended = self.attentions[number](
            extractor.query_norm(c), points, extractor.feat_norm(x), shapes, shapes.new_zeros(1)
        )
        c = c + attended
        return c + extractor.drop_path(conv_ffn(extractor.ffn, extractor.ffn_norm(c), grids))

    def forward(self, image: Tensor) -> list[Tensor]:
        """Compute maps at strides 4, 8, 16 and 32 from images ``[N, 3, H, W]``."""
        network, prior = self.network, self.network.spm
        height, width = image.shape[2:]
        grids = [(height // stride, width // stride) for stride in (8, 16, 32)]
        centres = [adapter.cell_centres(*grid, image.device) for grid in grids]
        points = torch.cat(centres)[None, :, None].expand(len(image), -1, -1, -1)
        layers = network.layers(image)

        hidden = [sequence(prior.stem, image)]
        for part in (prior.conv2, prior.conv3, prior.conv4):
            hidden.append(sequence(part, hidden[-1]))
        reduced = (prior.fc1, prior.fc2, prior.fc3, prior.fc4)
        c1, *rest = (convolved(layer, x) for layer, x in zip(reduced, hidden, strict=True))
        tokens = [x.flatten(2).transpose(1, 2) for x in rest]
        c = torch.cat([x + network.level_embed[i] for i, x in enumerate(tokens)], dim=1)

        for number in range(len(self.attentions)):
            c = self._extract(number, c, layers[min(number, 3)], points, grids)

        parts = c.split([h * w for h, w in grids], dim=1)
        c2, c3, c4 = (to_map(x, grid) for x, grid in zip(parts, grids, strict=True))
        maps = [c1 + upsampled(network.up, c2), c2, c3, c4]
        norms = (network.norm1, network.norm2, network.norm3, network.norm4)
        outputs = []
        for scale, norm, level, layer in zip((4, 2, 1, 0.5), norms, maps, layers, strict=True):
            x = to_map(layer, grids[1])
            if scale != 1:
                x = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
            outputs.append(normalised(norm, level + x))
        return outputs


def build(size: str, variant: str) -> nn.Module:
    """Build one of the three on the same random weights."""
    torch.manual_seed(0)
    network = vitadapter_zoo.backbone(
        NAMES[size], adapter="dinov3", pretrained=False, drop_path=0.0
    )
    # Fresh attentions look at fixed places with equal weights.
    for name, parameter in network.named_parameters():
        if "sampling_offsets.weight" in name or "attention_weights.weight" in name:
            nn.init.normal_(parameter, std=0.02)
    if variant == "ours":
        return network
    plain = Plain(cast("DINOv3Adapter", network)).eval()
    if variant == "accelerated" and accelerate(plain) != len(plain.attentions):
        raise RuntimeError("accelerate left attentions of the plain arrangement as they are")
    return plain


def forward(module: nn.Module, image: Tensor, precision: str) -> list[Tensor]:
    """Compute the maps; all weights have the precision."""
    with torch.inference_mode():
        maps: list[Tensor] = module.eval()(image.to(PRECISIONS[precision]))
    return maps


def step(module: nn.Module, image: Tensor, precision: str) -> list[Tensor]:
    """Compute the maps in training mode and the gradients of the adapter."""
    module.train()
    module.zero_grad(set_to_none=True)
    enabled = precision == "bfloat16"
    with torch.autocast(image.device.type, torch.bfloat16, enabled=enabled):
        maps: list[Tensor] = module(image)
        loss = torch.stack([x.float().square().mean() for x in maps]).sum()
    loss.backward()
    return [x.detach() for x in maps]


TASKS: dict[str, Callable[[nn.Module, Tensor, str], list[Tensor]]] = {
    "forward": forward,
    "training step": step,
}


def clock(device: str) -> float:
    """Processor time on the CPU, time on another device."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def image_for(size: tuple[int, int], task: str, device: str) -> Tensor:
    """Create a random image, or two for a training step."""
    numbers = torch.Generator().manual_seed(1)
    count = 2 if task == "training step" else 1
    return torch.randn(count, 3, *size, generator=numbers).to(device)


def prepared(size: str, variant: str, task: str, precision: str, device: str) -> nn.Module:
    """Build one with the task's weights on the device."""
    module = build(size, variant).to(device)
    return module.to(PRECISIONS[precision]) if task == "forward" else module


def peak(module: nn.Module, image: Tensor, task: str, precision: str) -> float:
    """Peak memory of a task in MB above what the process has before it (Linux)."""
    module.zero_grad(set_to_none=True)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident("VmRSS")
    TASKS[task](module, image, precision)
    return (_resident("VmHWM") - before) / 1024


def _resident(field: str) -> int:
    """A field of the process's status in kB."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{field}:")[2].split()[0])


def measure(
    size: str, pixels: tuple[int, int], runs: int, device: str, task: str, precision: str
) -> list[str]:
    """Check that the three agree, then measure them in turn; return a row of the table."""
    modules = {name: prepared(size, name, task, precision, device) for name in VARIANTS}
    image = image_for(pixels, task, device)
    run = TASKS[task]
    outputs = {name: run(module, image, precision) for name, module in modules.items()}
    for name in ("accelerated", "ours"):
        for got, expected in zip(outputs[name], outputs["plain"], strict=True):
            differs = (got - expected).abs().max() / expected.abs().max()
            if differs > TOLERANCE[precision]:
                raise RuntimeError(f"{name} differs from plain by {float(differs):.2g}")
    del outputs
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(runs):
        for name, module in modules.items():
            start = clock(device)
            run(module, image, precision)
            seconds[name].append(clock(device) - start)
    memory = ["-"] * len(VARIANTS)
    if device == "cpu":
        memory = [f"{peak(module, image, task, precision):.0f}" for module in modules.values()]
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = [
        statistics.median(a / b for a, b in zip(seconds["plain"], seconds[name], strict=True))
        for name in ("accelerated", "ours")
    ]
    return [
        size, task, precision, *(f"{middle[name]:.2f}" for name in VARIANTS),
        *(f"{ratio:.2f}" for ratio in ratios), *memory,
    ]  # fmt: skip


def report(sizes: list[str], pixels: tuple[int, int], runs: int, device: str) -> None:
    """Measure and print a table."""
    if device == "cpu":
        torch.set_num_threads(1)
    table = Table(
        "size", "task", "precision", *(f"{name}, s" for name in VARIANTS),
        "plain / accelerated", "plain / ours", *(f"{name}, MB" for name in VARIANTS),
    )  # fmt: skip
    for size in sizes:
        for task in TASKS:
            for precision in PRECISIONS:
                row = measure(size, pixels, runs, device, task, precision)
                print("  ".join(row), flush=True)
                table.add_row(*row)
    Console(width=160).print(table)
