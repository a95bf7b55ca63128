"""Draw docs/models.svg: box AP against seconds for an image and against the weights' megabytes.

The AP is the catalog's, the seconds are those of `vitadapter-zoo info`. Run it again when a row or
a measurement changes; `tests/test_docs.py` compares:

    make plot
"""

import math
from collections.abc import Callable
from html import escape
from pathlib import Path

from vitadapter_zoo import Row, get_row, list_models
from vitadapter_zoo.cli.models import SECONDS

TARGET = Path(__file__).parents[1] / "docs" / "models.svg"
WIDTH, HEIGHT = 480, 400  # pixels of a panel
LEFT, TOP, RIGHT, BOTTOM = 46, 34, 14, 46  # around its axes
LOWEST_AP, HIGHEST_AP = 39, 53
BYTES = 4  # of a parameter in float32

STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.title{font-weight:600;font-size:14px}"
    ".grid{stroke:#ddd}.adapter{fill:#0b6bcb}.plain{fill:#fff;stroke:#0b6bcb;stroke-width:2}"
)


def drawing() -> str:
    """The plot as SVG."""
    rows = [get_row(name) for name in list_models() if name in SECONDS]
    panels = (
        panel(rows, lambda row: SECONDS[row.name], (1.5, 2, 3, 5, 10, 20), "seconds for an image, "
              "2 CPU cores, 640 x 480"),
        panel(rows, lambda row: BYTES * row.parameters, (100, 200, 500, 1000, 1500), "megabytes "
              "of weights, float32"),
    )  # fmt: skip
    second = f'<g transform="translate({WIDTH} 0)">{panels[1]}</g>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {HEIGHT}" role="img">'
        f"<title>Box AP on COCO val2017, as published, against time and size</title>"
        f"<style>{STYLE}</style>"
        f'<rect width="{2 * WIDTH}" height="{HEIGHT}" fill="#fff"/>{panels[0]}{second}</svg>\n'
    )


def panel(
    rows: list[Row], cost: Callable[[Row], float], ticks: tuple[float, ...], title: str
) -> str:
    """One pair of axes with a point for each row; the horizontal axis is logarithmic."""
    low, high = math.log(ticks[0] * 0.9), math.log(ticks[-1] * 1.1)

    def x(value: float) -> float:
        return LEFT + (math.log(value) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(ap: float) -> float:
        share = (ap - LOWEST_AP) / (HIGHEST_AP - LOWEST_AP)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = [text(LEFT, 20, "box AP", "start", "title")]
    parts += [text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, title, "middle")]
    for ap in range(LOWEST_AP + 1, HIGHEST_AP, 2):
        parts.append(line(LEFT, y(ap), WIDTH - RIGHT, y(ap)))
        parts.append(text(LEFT - 6, y(ap) + 4, f"{ap}", "end"))
    for tick in ticks:
        parts.append(line(x(tick), TOP, x(tick), HEIGHT - BOTTOM))
        parts.append(text(x(tick), HEIGHT - BOTTOM + 16, f"{tick:g}", "middle"))
    for row in rows:
        parts += point(row, x(cost(row)), y(row.box_ap))
    return "".join(parts)


def point(row: Row, x: float, y: float) -> list[str]:
    """A filled circle for an adapter, an empty one for a plain ViT, and the name."""
    kind = "adapter" if row.has_adapter else "plain"
    # Without an FPN, a row lies close to the left of its neighbour.
    is_left = x > 0.62 * WIDTH or not row.fpn
    place = x - 9 if is_left else x + 9
    name = row.name.removeprefix("adapter-").removesuffix("-3x")
    circle = f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
    return [circle, text(place, y + 4, name, "end" if is_left else "start")]


def line(x1: float, y1: float, x2: float, y2: float) -> str:
    """A line of the grid."""
    return f'<line class="grid" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def text(x: float, y: float, words: str, anchor: str, kind: str = "") -> str:
    """Words at a place; ``anchor`` is SVG's."""
    style = f' class="{kind}"' if kind else ""
    return f'<text{style} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


if __name__ == "__main__":
    TARGET.write_text(drawing(), encoding="utf-8")
    print(TARGET)
