"""Measure the seconds per image of each stage, compared with the original implementation.

    python benchmarks/inference.py [ROW ...] [--peer plain|mmdet] [--runs 3] [--dtype bfloat16]
                                   [--variants | --memory] [--device cuda]

The input is a photo of 800 x 1216 network pixels at batch size 1, with stand-in weights (100
detections). ``native`` is this package in float32 or ``--dtype``. ``peer`` is the original
implementation with the same weights in float32: either plain PyTorch (``benchmarks/original.py``)
or, with ``--peer mmdet``, that backbone in mmdet's own detector, which needs mmdet. The script
first runs both and compares their results. Then it runs them alternately, so that other load on the
machine affects both, and prints medians. FLOPs are those of the original's matrix products and
convolutions. The share is relative to the rate of multiplying 2048 x 2048 matrices on this machine,
measured before and after; the higher rate counts.

``--variants`` runs the native model in other configurations on whole images and prints how much the
detections change. ``--memory`` measures the peak memory of an image above that of the loaded model,
in separate processes. ``--processor-time`` uses a single thread and measures its processor time.
This is less realistic, but other load on the machine hardly affects it.
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
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import box_iou

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests" / "support")]
import standins  # noqa: E402
from chains import PEERS, STAGES, Chain, Found, native, plain  # noqa: E402
from memory import peak_above_now  # noqa: E402

from vitadapter_zoo import Detections, MaskRCNN, get_row  # noqa: E402
from vitadapter_zoo.models import build  # noqa: E402

NAMES = ["adapter-t-deit-3x", "adapter-s-deit-3x", "adapter-b-deit-3x", "adapter-l-augreg-3x"]

Clock = Callable[[], float]


def load(name: str, device: str = "cpu") -> MaskRCNN:
    """Build a row's detector with stand-in weights."""
    with torch.device("meta"):
        model = build(get_row(name))
    model.load_state_dict(standins.state_dict(name), assign=True)
    return model.to(device).eval()


def synchronized() -> float:
    """Return the time after the GPU has finished its work, in seconds."""
    torch.cuda.synchronize()
    return time.perf_counter()


def run(chain: Chain, clock: Clock = time.perf_counter) -> tuple[Found, dict[str, float]]:
    """Run all stages on the image; return their results and the seconds that they took."""
    found: Found = {}
    seconds = {}
    for stage, compute in chain.items():
        start = clock()
        found[stage] = compute(found)
        seconds[stage] = clock() - start
    return found, seconds


def check(ours: Found, theirs: Found, dtype: torch.dtype) -> str:
    """Describe the differences of two chains; exit if they exceed the rounding of float32."""
    differences = [
        float((a - b).abs().max() / b.abs().max())
        for stage in ("backbone", "neck")
        for a, b in zip(ours[stage], theirs[stage], strict=True)
    ]
    moved = compare(detections(ours), detections(theirs))
    summary = f"features within {max(differences):.0e} of their largest; {moved}"
    if dtype != torch.float32:
        return summary
    if max(differences) > 1e-4 or moved.matched < 1 or moved.score > 1e-3 or moved.mask < 0.99:
        raise SystemExit(f"the peer's results differ: {summary}")
    return summary


def detections(found: Found) -> Detections:
    """Create detections from the results of a chain's last stages."""
    boxes = found["box head"]
    return Detections(
        boxes.boxes.cpu(), boxes.scores.cpu(), boxes.labels.cpu(), found["paste"].cpu()
    )


class Moved:
    """The differences of two sets of detections, over pairs of the same class with IoU > 0.5."""

    def __init__(self, matched: float, score: float, box: float, mask: float) -> None:
        self.matched, self.score, self.box, self.mask = matched, score, box, mask

    def __str__(self) -> str:
        return (
            f"{self.matched:.0%} matched, score +-{self.score:.4f}, box +-{self.box:.2f} px, "
            f"mask IoU {self.mask:.4f}"
        )


def compare(found: Detections, expected: Detections) -> Moved:
    """Compute the share of ``expected`` that has a match in ``found``, and the mean differences."""
    overlaps = box_iou(expected.boxes, found.boxes)
    overlaps[expected.labels[:, None] != found.labels] = 0
    pairs = []
    for index in range(len(expected)):
        overlap, partner = overlaps[index].max(dim=0)
        if overlap > 0.5:
            overlaps[:, partner] = 0
            pairs.append((index, int(partner)))
    a, b = (torch.tensor(side) for side in zip(*pairs, strict=True))
    union = (expected.masks[a] | found.masks[b]).sum((1, 2))
    both = torch.where(union > 0, (expected.masks[a] & found.masks[b]).sum((1, 2)), 1)
    return Moved(
        len(pairs) / len(expected),
        float((expected.scores[a] - found.scores[b]).abs().mean()),
        float((expected.boxes[a] - found.boxes[b]).abs().mean()),
        float((both / union.clamp(min=1)).mean()),
    )


def matrix_rate(clock: Clock, dtype: torch.dtype, device: str) -> float:
    """Measure the GFLOP/s of multiplying 2048 x 2048 matrices: the best of ten."""
    a = torch.randn(2048, 2048, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(11):
        start = clock()
        a @ a
        best = min(best, clock() - start)
    return 2 * 2048**3 / best / 1e9


def flops(chain: Chain) -> dict[str, float]:
    """Count the GFLOP of every stage's matrix products and convolutions."""
    found: Found = {}
    counts = {}
    for stage, compute in chain.items():
        with FlopCounterMode(display=False) as counter:
            found[stage] = compute(found)
        counts[stage] = counter.get_total_flops() / 1e9
    return counts


def by_stage(
    name: str,
    peer: str,
    runs: int,
    dtype: torch.dtype,
    clock: Clock,
    console: Console,
    device: str,
) -> None:
    """Print the table of a row; the peer always uses float32."""
    model = load(name, device)
    chains = {"native": native(copy.deepcopy(model).to(dtype)), peer: PEERS[peer](model)}
    console.print(f"{name}: {check(run(chains['native'])[0], run(chains[peer])[0], dtype)}")
    rate = matrix_rate(clock, dtype, device)
    taken: dict[str, list[dict[str, float]]] = {kind: [] for kind in chains}
    for _ in range(runs):
        for kind, chain in chains.items():
            taken[kind].append(run(chain, clock)[1])
    medians = {
        kind: {stage: statistics.median(one[stage] for one in all_runs) for stage in STAGES}
        for kind, all_runs in taken.items()
    }
    counts = flops(plain(model))
    for values in (*medians.values(), counts):
        values["total"] = sum(values.values())
    rate = max(rate, matrix_rate(clock, dtype, device))
    table = Table(title=f"{name}, native {str(dtype)[6:]}, {rate:.0f} GFLOP/s")
    for column in ("stage", "native s", f"{peer} s", "ratio", "GFLOP", "share of rate"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage, ours in medians["native"].items():
        theirs, work = medians[peer][stage], counts[stage]
        share = f"{work / ours / rate:.2f}" if work else ""
        table.add_row(
            stage, f"{ours:.3f}", f"{theirs:.3f}", f"{theirs / ours:.2f}", f"{work:.1f}", share
        )
    console.print(table)


def images(model: MaskRCNN, count: int) -> Callable[[], Detections]:
    """Return a function that detects on ``count`` images and returns the last detections."""
    prepared = [model.preprocess(standins.PHOTO)] * count
    return lambda: model(prepared)[-1]


def variants(name: str, peer: str, runs: int, clock: Clock, console: Console) -> None:
    """Time other configurations of the native model on whole images after preprocessing."""
    model = load(name)
    half = copy.deepcopy(model).bfloat16()
    compiled, compiled_half = copy.deepcopy(model), copy.deepcopy(half)
    compiled.compile()
    compiled_half.compile()
    ordered = copy.deepcopy(model).to(memory_format=torch.channels_last)

    def autocast() -> Detections:
        with torch.autocast("cpu", torch.bfloat16):
            return images(model, 1)()

    calls: dict[str, tuple[Callable[[], Detections], int]] = {
        f"{peer}, float32": (lambda: detections(run(PEERS[peer](model))[0]), 1),
        "float32": (images(model, 1), 1),
        "float32, channels-last weights": (images(ordered, 1), 1),
        "float32, compiled": (images(compiled, 1), 1),
        "float32, batch 2": (images(model, 2), 2),
        "float32, batch 4": (images(model, 4), 4),
        "bfloat16 autocast": (autocast, 1),
        "bfloat16": (images(half, 1), 1),
        "bfloat16, compiled": (images(compiled_half, 1), 1),
        "bfloat16, batch 2": (images(half, 2), 2),
        "bfloat16, batch 4": (images(half, 4), 4),
    }
    results = {label: call() for label, (call, _) in calls.items()}
    taken: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(runs):
        for label, (call, count) in calls.items():
            start = clock()
            call()
            taken[label].append((clock() - start) / count)
    medians = {label: statistics.median(times) for label, times in taken.items()}
    table = Table(title=f"{name}: seconds per image, all stages")
    for column in ("variant", "s", "times as fast as peer", "detections beside float32"):
        table.add_column(column, justify="right" if column[0] in "st" else "left")
    for label, seconds in medians.items():
        ratio = next(iter(medians.values())) / seconds
        moved = compare(results[label], results["float32"])
        table.add_row(label, f"{seconds:.3f}", f"{ratio:.2f}", str(moved))
    console.print(table)


def memory_of_one_image(name: str, kind: str) -> None:
    """Print the peak memory of an image above the loaded model, MB. Run it in a new process."""
    if kind in PEERS:
        chain = PEERS[kind](load(name))
    else:
        chain = native(load(name).to(torch.bfloat16 if kind == "bfloat16" else torch.float32))

    print(peak_above_now(lambda: run(chain)))


def memory(name: str, peer: str, console: Console) -> None:
    """Print a line with the peak memory of an image."""
    peaks = {}
    for kind in ("native", peer, "bfloat16"):
        command = [sys.executable, __file__, name, "--memory-of", kind]
        output = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
        peaks[kind] = float(output.stdout.split()[-1])
    console.print(
        f"{name}: one image takes {peaks['native']:.0f} MB above the loaded model, "
        f"{peer} {peaks[peer]:.0f} MB ({peaks[peer] / peaks['native']:.2f}x), "
        f"bfloat16 weights {peaks['bfloat16']:.0f} MB"
    )


@torch.inference_mode()
def main() -> None:
    """Measure the given rows or, by default, a row of each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", default=NAMES)
    parser.add_argument("--peer", choices=PEERS, default="plain")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu", help="for the table of the stages")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--processor-time", action="store_true")
    arguments = parser.parse_args()
    if arguments.memory_of:
        memory_of_one_image(arguments.rows[0], arguments.memory_of)
        return
    clock = time.perf_counter
    if arguments.device.startswith("cuda"):
        if arguments.variants or arguments.memory or arguments.peer == "mmdet":
            parser.error("--device cuda measures the stages beside --peer plain only")
        clock = synchronized
    if arguments.processor_time:
        torch.set_num_threads(1)
        clock = time.process_time
    console = Console(width=130)
    console.print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in arguments.rows:
        if arguments.memory:
            memory(name, arguments.peer, console)
        elif arguments.variants:
            variants(name, arguments.peer, arguments.runs, clock, console)
        else:
            dtype = getattr(torch, arguments.dtype)
            by_stage(name, arguments.peer, arguments.runs, dtype, clock, console, arguments.device)


if __name__ == "__main__":
    main()
