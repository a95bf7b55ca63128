"""Measure a training step, compared with the original arrangement and with torchvision.

    python benchmarks/train.py [ROW ...] [--size 512] [--batch-size 2] [--runs 5] [--device cuda]

``zoo`` is this package in float32. ``original`` is the same network with the backbone computed as
in the original implementation (``benchmarks/original.py``: attention with its weights in memory,
windows by unfold, deformable attention by grid_sample). ``torchvision`` is its Mask R-CNN with
ResNet-50 and FPN on the same images, with its own losses. All three start from random weights and
get the same random images and objects. Stochastic depth is off, so that no block is skipped.

The script first checks that the losses of ``zoo`` and ``original`` agree. Then it runs a step of
each in turn, so that other load on the machine affects all, and prints medians. The peak memory
above the built model is measured in a separate process for each.
"""

import argparse
import copy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from timm.layers import DropPath
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn

sys.path[:0] = [str(Path(__file__).parent)]
import original  # noqa: E402
from memory import peak_above_now  # noqa: E402

from vitadapter_zoo import MaskRCNN, get_row  # noqa: E402
from vitadapter_zoo.images import NetworkInput  # noqa: E402
from vitadapter_zoo.models import build  # noqa: E402
from vitadapter_zoo.training import losses  # noqa: E402

ROWS = ["adapter-t-deit-3x", "adapter-s-deit-3x"]
KINDS = ("zoo", "original", "torchvision")
OBJECTS = 8  # in each image

Step = Callable[[], None]


class Original(nn.Module):
    """A backbone of this package, computed as in the original implementation."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images ``[N, 3, H, W]`` to four maps."""
        return original.backbone(self.backbone, images)


def detector(name: str, device: str) -> MaskRCNN:
    """Build a row's detector with random weights and without stochastic depth."""
    torch.manual_seed(0)
    model = build(get_row(name))
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    return model.to(device).train()


def with_original_backbone(model: MaskRCNN) -> MaskRCNN:
    """Copy a detector; compute the copy's backbone as in the original implementation."""
    other = copy.deepcopy(model)
    other.backbone = Original(other.backbone)
    return other


def batch(size: int, count: int, device: str) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Random images ``[3, size, size]`` and their objects: boxes, labels and elliptic masks."""
    generator = torch.Generator().manual_seed(1)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    images, targets = [], []
    for _ in range(count):
        images.append(torch.randn(3, size, size, generator=generator).to(device))
        sides = size * (0.05 + 0.4 * torch.rand(OBJECTS, 2, generator=generator))
        corners = torch.rand(OBJECTS, 2, generator=generator) * (size - sides)
        centres, radii = (corners + sides / 2)[..., None, None], (sides / 2)[..., None, None]
        masks = ((x - centres[:, 0]) / radii[:, 0]) ** 2 + ((y - centres[:, 1]) / radii[:, 1]) ** 2
        target = {
            "boxes": torch.cat([corners, corners + sides], dim=1),
            "labels": torch.randint(80, (OBJECTS,), generator=generator),
            "masks": masks <= 1,
        }
        targets.append({key: value.to(device) for key, value in target.items()})
    return images, targets


def zoo_step(model: MaskRCNN, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Step:
    """Return a function that does one optimizer step."""
    size = (images[0].shape[1], images[0].shape[2])
    inputs = [NetworkInput(image[None], size, size, (1.0, 1.0, 1.0, 1.0)) for image in images]
    return _step(model, lambda: model(inputs, targets))


def torchvision_step(images: list[Tensor], targets: list[dict[str, Tensor]], device: str) -> Step:
    """Return a function that does one optimizer step of torchvision's Mask R-CNN."""
    size = images[0].shape[1]
    model = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=81, min_size=size, max_size=size
    )
    own = [
        target | {"labels": target["labels"] + 1, "masks": target["masks"].byte()}
        for target in targets
    ]
    model = model.to(device).train()
    return _step(model, lambda: model(images, own))


def _step(model: nn.Module, loss: Callable[[], dict[str, Tensor]]) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step() -> None:
        total = torch.stack(list(loss().values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if total.is_cuda:
            torch.cuda.synchronize()

    return step


def check(model: MaskRCNN, other: MaskRCNN, size: int, device: str) -> str:
    """Describe the difference of the losses of all anchors and proposals; exit if it is large."""
    images, targets = batch(size, 1, device)
    inputs = [NetworkInput(images[0][None], (size, size), (size, size), (1.0, 1.0, 1.0, 1.0))]
    with torch.no_grad():
        ours, theirs = (losses(net, inputs, targets, sample=False) for net in (model, other))
    moved = max(float(abs(ours[key] / theirs[key] - 1)) for key in ours)
    if moved > 1e-3:
        raise SystemExit(f"the losses of the original arrangement differ by {moved:.1e}")
    return f"losses within {moved:.0e} of the original arrangement"


def steps(name: str, kinds: tuple[str, ...], arguments: argparse.Namespace) -> dict[str, Step]:
    """Return a training step of each kind."""
    images, targets = batch(arguments.size, arguments.batch_size, arguments.device)
    found: dict[str, Step] = {}
    for kind in kinds:
        if kind == "torchvision":
            found[kind] = torchvision_step(images, targets, arguments.device)
        else:
            model = detector(name, arguments.device)
            if kind == "original":
                model = with_original_backbone(model)
            found[kind] = zoo_step(model, images, targets)
    return found


def memory(name: str, kind: str, arguments: argparse.Namespace) -> float:
    """Peak memory of two steps above the built model, in MB, measured in a new process."""
    command = [
        sys.executable, __file__, name, "--memory-of", kind, "--size", str(arguments.size),
        "--batch-size", str(arguments.batch_size), "--device", arguments.device,
    ]  # fmt: skip
    output = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    return float(output.stdout.split()[-1])


def memory_here(name: str, kind: str, arguments: argparse.Namespace) -> float:
    """Peak memory of two steps above the built model, in MB."""
    step = steps(name, (kind,), arguments)[kind]

    def twice() -> None:
        step()
        step()

    if not arguments.device.startswith("cuda"):
        return peak_above_now(twice)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    twice()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(name: str, arguments: argparse.Namespace, console: Console) -> None:
    """Print the table of a row."""
    model = detector(name, arguments.device)
    console.print(
        f"{name}: {check(model, with_original_backbone(model), arguments.size, arguments.device)}"
    )
    del model
    found = steps(name, KINDS, arguments)
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for run in range(arguments.runs + 1):
        for kind, step in found.items():
            start = time.perf_counter()
            step()
            if run:  # the first step allocates
                taken[kind].append(time.perf_counter() - start)
    table = Table(title=f"{name}: {arguments.batch_size} images of {arguments.size} pixels a step")
    for column in ("", "s per step", "times as long as zoo", "peak MB"):
        table.add_column(column, justify="right" if column else "left")
    ours = statistics.median(taken["zoo"])
    for kind in KINDS:
        seconds = statistics.median(taken[kind])
        peak = memory(name, kind, arguments)
        table.add_row(kind, f"{seconds:.2f}", f"{seconds / ours:.2f}", f"{peak:.0f}")
    console.print(table)


def main() -> None:
    """Measure the given rows; the default is a tiny and a small one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", default=ROWS)
    parser.add_argument("--size", type=int, default=512, help="side of the images, pixels")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory-of", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(memory_here(arguments.rows[0], arguments.memory_of, arguments))
        return
    console = Console(width=100)
    console.print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in arguments.rows:
        measure(name, arguments, console)


if __name__ == "__main__":
    main()
