"""Measure the Winograd 3x3 convolution, compared with PyTorch's.

    python benchmarks/conv3x3.py [--runs 9] [--threads 1] [--processor-time]

The shapes are those of an 800 x 1216 image: the neck's and the proposal head's maps, the mask head
with 100 and with 10 regions, and the stem. Every round runs both, so that other load on the machine
affects both. The script prints medians. ``ratio`` is PyTorch's time divided by ours.

The rates are relative to multiplying 2048 x 2048 matrices here, measured before and after the
shapes; the higher rate counts. ``direct`` counts the multiplications of PyTorch's convolution and
``products`` those that remain for ours. With ``--processor-time`` (one thread) other load on the
machine hardly affects the results.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from vitadapter_zoo.ops.conv3x3 import accepts, conv3x3, tile_size
from vitadapter_zoo.ops.library import implementation

SHAPES = (  # images, channels, height, width
    (1, 256, 200, 304),
    (1, 256, 100, 152),
    (1, 256, 50, 76),
    (1, 256, 25, 38),
    (1, 256, 13, 19),
    (100, 256, 14, 14),
    (10, 256, 14, 14),
    (1, 64, 400, 608),
)
SIDE = 2048
Clock = Callable[[], float]


def matrix_rate(clock: Clock, runs: int) -> float:
    """Measure the multiplications and additions per second of a matrix product."""
    left, right = torch.randn(2, SIDE, SIDE)
    taken = medians({"product": lambda: left @ right}, clock, runs)
    return 2 * SIDE**3 / taken["product"]


def medians(calls: dict[str, Callable[[], object]], clock: Clock, runs: int) -> dict[str, float]:
    """Measure the median time of each call over ``runs`` rounds, after a warm-up call."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(runs + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if turn:
                taken[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def measure(shape: tuple[int, int, int, int], clock: Clock, runs: int) -> dict[str, float]:
    """Measure one shape; return the seconds of both and the work that they do."""
    images, channels, height, width = shape
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(channels, channels, 3, 3), torch.randn(channels)
    if not accepts(x, weight, bias):
        raise SystemExit("the compiled convolution is not used here; see `vitadapter-zoo env`")
    tile = tile_size(height, width)
    taken = medians(
        {
            "ours": lambda: conv3x3(x, weight, bias),
            "torch": lambda: F.conv2d(x, weight, bias, padding=1),
        },
        clock,
        runs,
    )
    tiles = images * -(-height // tile) * -(-width // tile)
    return taken | {
        "direct": 2 * 9 * images * height * width * channels**2,
        "products": 2 * (tile + 2) ** 2 * tiles * channels**2,
    }


def main() -> None:
    """Measure all shapes and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9, help="rounds of which the median is taken")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--processor-time", action="store_true", help="of a single thread")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1 if options.processor_time else options.threads)
    clock = time.thread_time if options.processor_time else time.perf_counter
    print(f"{implementation('cpu').why}; {torch.get_num_threads()} threads")
    with torch.inference_mode():
        rate = matrix_rate(clock, options.runs)
        found = {shape: measure(shape, clock, options.runs) for shape in SHAPES}
        rate = max(rate, matrix_rate(clock, options.runs))
    print(f"matrix product: {rate / 1e9:.0f} GFLOP/s")
    for shape, result in found.items():
        ours, theirs = result["ours"], result["torch"]
        print(
            f"{' x '.join(map(str, shape)):<20} ours {ours * 1e3:7.2f} ms"
            f"  torch {theirs * 1e3:7.2f} ms  ratio {theirs / ours:4.2f}"
            f"  products {result['products'] / ours / rate:4.2f} of the rate"
            f"  direct {result['direct'] / theirs / rate:4.2f}"
        )


if __name__ == "__main__":
    main()
