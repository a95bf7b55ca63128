"""The peak memory of a computation, for the benchmarks; Linux."""

from collections.abc import Callable
from pathlib import Path


def peak_above_now(compute: Callable[[], object]) -> float:
    """Run ``compute`` and return how far the process's memory rose above its present size, MB."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    compute()
    return _status("VmHWM") - before


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
