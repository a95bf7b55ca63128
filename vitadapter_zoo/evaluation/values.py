"""Numbers and boxes of annotation and result files: finite, and small enough to calculate with."""

from __future__ import annotations

from typing import Any

LARGEST = 1e9  # pixels from the origin, beyond which a coordinate is a mistake


def number(value: Any, low: float, high: float) -> float | None:
    """A number of a JSON file; None where it is none, not finite, or outside of low..high."""
    if type(value) not in (int, float) or not low <= value <= high:
        return None
    return float(value)


def coordinates(values: Any) -> list[float] | None:
    """A list of places in an image in pixels; None where the value is no such list."""
    if not isinstance(values, list):
        return None
    found = [number(value, -LARGEST, LARGEST) for value in values]
    numbers = [value for value in found if value is not None]
    return numbers if len(numbers) == len(values) else None


def box(values: Any) -> list[float] | None:
    """A box ``[x, y, width, height]`` in pixels; None where the value is no such list."""
    found = coordinates(values)
    if found is None or len(found) != 4 or min(found[2:]) < 0:
        return None
    return found
