"""Measure loading from the cache, compared with reading the bytes and with the original's loading.

    python benchmarks/load.py [ROW] [--runs 5]

Every measurement runs in a new process, with stand-in weights in the published format:

- ``read``: plain Python reads the bytes of the converted file into memory. This is the lower limit.
- ``load``: ``vitadapter_zoo.load(ROW)`` from the cache.
- ``torch``: as in the original code, the network is built, torch.load reads the original file, and
  load_state_dict copies the weights.

``load`` and ``torch`` then run a first forward pass on a 320 x 320 image, because memory-mapped
weights are read from the file only then. The script prints medians of seconds, without imports.
Memory is the process's peak above that of its imports, relative to the weights' size. For ``cold``
the files' pages are first dropped from the page cache.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import json, sys, time
import torch, vitadapter_zoo
from vitadapter_zoo.models import build
from pathlib import Path
kind, row, source, weights = sys.argv[1:]

def memory(field):  # of this process alone, which getrusage after a fork is not
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[field].split()[0]) * 1024

torch.zeros(1).add(1)
before, start = memory("VmRSS"), time.perf_counter()
if kind == "read":
    kept = Path(weights).read_bytes()
elif kind == "load":
    model = vitadapter_zoo.load(row, checkpoint=source)
else:
    model = build(vitadapter_zoo.get_row(row))
    state = torch.load(source, map_location="cpu", weights_only=False)["state_dict"]
    model.load_state_dict(state, strict=False)
    model.eval()
loaded = time.perf_counter() - start
top = memory("VmHWM") - before
if kind != "read":
    with torch.inference_mode():
        model.backbone(torch.zeros(1, 3, 320, 320))
print(json.dumps([loaded, time.perf_counter() - start, top]))
"""
KINDS = ("read", "load", "torch")


def drop_pages(path: Path) -> None:
    """Drop a file's pages from the page cache, so that they are read from the disk again."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(row: str, runs: int) -> None:
    """Print the table for ``row``."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
    import standins
    import torch

    import vitadapter_zoo

    with tempfile.TemporaryDirectory() as folder:
        os.environ["VITADAPTER_ZOO_HOME"] = folder
        source = Path(folder) / "published.pth.tar"
        torch.save(standins.checkpoint(row), source)
        vitadapter_zoo.load(row, checkpoint=source)
        (weights,) = Path(folder).rglob("*.safetensors")
        size = weights.stat().st_size
        for state in ("warm", "cold"):
            found: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
            for _ in range(runs):
                for kind in KINDS:
                    if state == "cold":
                        drop_pages(source)
                        drop_pages(weights)
                    command = [sys.executable, "-c", CHILD, kind, row, str(source), str(weights)]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
                    found[kind].append(json.loads(done.stdout))
            print(f"{row}, {size / 1e6:.0f} MB, {state}")
            medians = {
                kind: [statistics.median(column) for column in zip(*rows, strict=True)]
                for kind, rows in found.items()
            }
            for kind, (loaded, forward, top) in medians.items():
                line = f"  {kind:<6} {loaded:7.3f} s = {loaded / medians['read'][0]:5.2f}x of read"
                if kind != "read":
                    line += f"  with a first forward {forward:7.3f} s"
                print(f"{line}  peak {top / size:5.2f}x", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row", nargs="?", default="adapter-l-augreg-3x")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    measure(options.row, options.runs)
