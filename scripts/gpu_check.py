"""Check and measure the package on a GPU.

    python scripts/gpu_check.py [--out gpu-check.json] [--device cpu --quick] [SECTION ...]

The script needs torch, torchvision, timm, safetensors, huggingface_hub, opencv and nvcc, but no
network. Without a GPU every section says "no CUDA device". Each section runs in its own process
with a time limit, so a crash or a hang affects only that section, and the failure of a part does
not keep a section's other parts from running. The JSON file is updated after every section, and a
table is printed at the end. The exit status is 1 if a section failed, otherwise 0.

``--device cpu --quick`` executes the sections on the CPU with a small network, to find mistakes in
this script before a GPU's time is spent on it. Its numbers mean nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
PROJECT = SCRIPTS.parent

# Each section with its time limit in seconds.
LIMITS = {
    "device": 60,
    "build": 240,
    "operator": 120,
    "sanitizer": 90,
    "parity": 150,
    "precision": 120,
    "predict": 90,
    "waits": 60,
    "batches": 60,
    "graphs": 90,
    "batch_memory": 60,
    "verify": 150,
    "attention": 40,
    "operator_speed": 90,
    "image_speed": 150,
    "training_speed": 60,
    "profile": 60,
}
SLOWER_ON_CPU = 4  # factor of the time limits


def run_section(name: str, limit: int, options: list[str]) -> dict[str, Any]:
    """Run one section in a new process.

    Args:
        name: a function of ``gpu_sections.py``.
        limit: seconds.
        options: of ``gpu_sections.py``.

    Returns:
        The section's results and ``seconds``; ``error`` if it failed.
    """
    paths = [PROJECT, PROJECT / "tests" / "support", PROJECT / "benchmarks"]
    environment = os.environ | {
        "PYTHONPATH": ":".join([*map(str, paths), os.environ.get("PYTHONPATH", "")]),
    }
    started = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, SCRIPTS / "gpu_sections.py", name, *options],
            env=environment,
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {limit} s", "seconds": float(limit)}
    seconds = round(time.monotonic() - started, 1)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no output"]
        return {"error": said[-1], "log": said[-25:], "seconds": seconds}
    found: dict[str, Any] = json.loads(lines[-1])
    return found | {"seconds": seconds}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Format the results as lines of text: each section, then its values."""
    lines = []
    for name, found in results.items():
        state = "FAILED" if "error" in found else found.get("skipped", "ok")
        lines.append(f"{name} ({found['seconds']} s): {state}")
        for key, value in found.items():
            if key in ("seconds", "skipped", "log"):
                continue
            if isinstance(value, list):
                lines += [f"  {key}: {item}" for item in value]
            elif isinstance(value, dict):
                lines += [f"  {key}, {part}: {item}" for part, item in value.items()]
            else:
                lines.append(f"  {key}: {value}")
    return "\n".join(lines)


def main() -> int:
    """Run the sections on the command line, or all sections."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(LIMITS))
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small networks, no measurement")
    options = parser.parse_args()
    passed_on = ["--device", options.device, *(["--quick"] if options.quick else [])]
    unknown = set(options.sections) - set(LIMITS)
    if unknown:
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    results: dict[str, dict[str, Any]] = {}
    for name in options.sections or LIMITS:
        limit = SLOWER_ON_CPU * LIMITS[name] if options.device == "cpu" else LIMITS[name]
        results[name] = run_section(name, limit, passed_on)
        options.out.write_text(json.dumps(results, indent=1))
        print(table({name: results[name]}), flush=True)
    failed = [name for name, found in results.items() if "error" in found]
    print(f"{len(results)} sections, {len(failed)} failed; {options.out}", *failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
