"""Numbers and boxes of annotation and result files: finite, and small enough to calculate with."""

from __future__ import annotations

from typing import Any

LARGEST = 1e9  # pixels from the origin, beyond which a coordinate is a mistake


def number(value: Any, low: float, high: float) -> float | None:
    """Return a JSON value as a number; None if it is not a finite number in low..high."""
    if type(value) not in (int, float) or not low <= value <= high:
        return None
    return float(value)


def coordinates(values: Any) -> list[float] | None:
    """Return a list of pixel coordinates; None if the value is not such a list."""
    if not isinstance(values, list):
        return None
    found = [number(value, -LARGEST, LARGEST) for value in values]
    numbers = [value for value in found if value is not None]
    return numbers if len(numbers) == len(values) else None


def box(values: Any) -> list[float] | None:
    """Return a box ``[x, y, width, height]`` in pixels; None if the value is not a box."""
    found = coordinates(values)
    if found is None or len(found) != 4 or min(found[2:]) < 0:
        return None
    return found
