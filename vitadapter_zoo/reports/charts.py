"""SVG charts for the report pages; ``page.css`` has their colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from markupsafe import Markup

_WIDTH, _HEIGHT = 420, 300
_LEFT, _TOP, _RIGHT, _BOTTOM = 44, 10, 10, 38  # around the plot, for ticks and titles


def curves(series: Mapping[str, Sequence[float]], x_title: str, y_title: str) -> Markup:
    """Draw a line chart over 0..1, one line per name, with a legend.

    Args:
        series: by name, values in 0..1 at evenly spaced places from 0 to 1.
        x_title: title of the horizontal axis.
        y_title: title of the vertical axis.
    """
    parts = [_axes(x_title, y_title, 1)]
    for place, (name, values) in enumerate(series.items()):
        points = " ".join(
            f"{_x(index / max(1, len(values) - 1)):.1f},{_y(value):.1f}"
            for index, value in enumerate(values)
        )
        top = _HEIGHT - _BOTTOM - 14 - 16 * (len(series) - 1 - place)
        parts.append(f'<polyline class="line s{place}" points="{points}"/>')
        parts.append(
            f'<line class="line s{place}" x1="{_LEFT + 10}" x2="{_LEFT + 30}" '
            f'y1="{top - 4}" y2="{top - 4}"/>'
        )
        parts.append(_text(_LEFT + 36, top, name))
    return _svg(f"{y_title} over {x_title}", _WIDTH, _HEIGHT, parts)


def histogram(counts: Sequence[int], x_title: str, y_title: str) -> Markup:
    """Draw a histogram with bins of equal width over 0..1.

    Args:
        counts: of each bin.
        x_title: title of the horizontal axis.
        y_title: title of the vertical axis.
    """
    highest = _round_above(max([*counts, 1]))
    parts = [_axes(x_title, y_title, highest)]
    for index, count in enumerate(counts):
        left, right = _x(index / len(counts)), _x((index + 1) / len(counts))
        top = _y(count / highest)
        label = f"{index / len(counts):.2f} to {(index + 1) / len(counts):.2f}: {count:,}"
        parts.append(
            f'<rect class="fill s0" x="{left + 0.5:.1f}" width="{right - left - 1:.1f}" '
            f'y="{top:.1f}" height="{_y(0) - top:.1f}"><title>{label}</title></rect>'
        )
    return _svg(f"{y_title} over {x_title}", _WIDTH, _HEIGHT, parts)


def bars(groups: Mapping[str, Mapping[str, float | None]]) -> Markup:
    """Draw horizontal bars of 0..100 with their values; the first group's names are the legend.

    Args:
        groups: by title, then by series name; None if no object is annotated.
    """
    left, width, thick = 70, _WIDTH - 70 - 46, 15
    names = list(next(iter(groups.values())))
    parts = []
    y = 6
    for title, values in groups.items():
        parts.append(_text(left - 8, y + thick * len(values) / 2 + 4, title, anchor="end"))
        for place, value in enumerate(values.values()):
            long = width * max(0.0, value or 0.0) / 100
            parts.append(
                f'<rect class="fill s{place}" x="{left}" y="{y}" width="{long:.1f}" '
                f'height="{thick - 2}"/>'
            )
            written = "-" if value is None else f"{value:.1f}"
            parts.append(_text(left + long + 5, y + thick - 4, written))
            y += thick
        y += 10
    for place, name in enumerate(names):
        x = left + 90 * place
        parts.append(f'<rect class="fill s{place}" x="{x}" y="{y}" width="12" height="12"/>')
        parts.append(_text(x + 18, y + 10, name))
    return _svg(", ".join(groups), _WIDTH, y + 20, parts)


def _x(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _y(share: float) -> float:
    return _TOP + (1 - share) * (_HEIGHT - _TOP - _BOTTOM)


def _axes(x_title: str, y_title: str, highest: float) -> str:
    """Draw grid and ticks: 0..1 horizontally, 0..``highest`` vertically."""
    parts = []
    for step in range(6):
        share = step / 5
        across, up = _x(share), _y(share)
        parts.append(
            f'<line class="grid" x1="{across:.1f}" x2="{across:.1f}" y1="{_y(0)}" y2="{_y(1)}"/>'
            f'<line class="grid" x1="{_x(0)}" x2="{_x(1)}" y1="{up:.1f}" y2="{up:.1f}"/>'
        )
        parts.append(_text(across, _y(0) + 15, f"{share:.1f}", anchor="middle"))
        parts.append(_text(_LEFT - 5, up + 4, _tick(share * highest), anchor="end"))
    parts.append(_text(_x(0.5), _HEIGHT - 5, x_title, anchor="middle"))
    middle = _y(0.5)
    parts.append(
        f'<text x="10" y="{middle}" text-anchor="middle" transform="rotate(-90 10 {middle})">'
        f"{escape(y_title)}</text>"
    )
    return "".join(parts)


def _round_above(count: int) -> int:
    """Return the smallest of 5, 10, 20, 50, 100, ... that is not below a count."""
    power = 1
    while True:
        for digit in (5, 10, 20):
            if digit * power >= count:
                return digit * power
        power *= 10


def _tick(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1000:,.0f}k"
    return f"{value:g}" if value >= 1 or value == 0 else f"{value:.1f}"


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(label: str, width: float, height: float, parts: Sequence[str]) -> Markup:
    return Markup(  # noqa: S704  numbers, and texts that went through escape
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width} {height}">'
        f"{''.join(parts)}</svg>"
    )
