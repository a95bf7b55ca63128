"""Detections as HTML: the picture with labels that appear over a box, and the table."""

from __future__ import annotations

import html
import io
from base64 import b64encode
from typing import TYPE_CHECKING

import cv2
import numpy as np

from vitadapter_zoo.text import shown

if TYPE_CHECKING:
    from vitadapter_zoo.detections import Detections
    from vitadapter_zoo.images.images import RGB

SIDE = 1280  # pixels of the longest side of the picture on the page
QUALITY = 88  # of its JPEG, 1..100
NAME = 60  # characters of a class's name
EDGE = 55.0  # percent of the width; labels of boxes right of it grow to the left

STYLE = """<style>
.zoo-picture { position: relative; line-height: 0; }
.zoo-picture img { width: 100%; height: auto; }
.zoo-box { position: absolute; cursor: help; }
.zoo-box span { display: none; position: absolute; top: 0; padding: 2px 6px; z-index: 2;
  font: 600 14px/1.4 system-ui, sans-serif; color: #fff !important; background: #000c;
  white-space: nowrap; }
.zoo-box:hover, .zoo-box:focus { outline: 3px solid #fff; box-shadow: 0 0 0 5px #000; z-index: 1; }
.zoo-box:hover span, .zoo-box:focus span { display: block; }
.zoo-scroll { max-height: 24rem; overflow: auto; }
.zoo-table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.zoo-table th, .zoo-table td { padding: 4px 6px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #8886; }
.zoo-table th:first-child, .zoo-table td:first-child { text-align: left; white-space: normal;
  overflow-wrap: break-word; }
@media (max-width: 480px) { .zoo-table th:nth-child(4), .zoo-table td:nth-child(4) {
  display: none; } }
.zoo-note { padding: 1rem; border-left: 4px solid #c60; }
</style>"""


def reduced(rgb: RGB) -> RGB:
    """Shrink the picture to at most ``SIDE`` pixels per side, uint8 RGB ``[H, W, 3]``."""
    height, width = rgb.shape[:2]
    factor = SIDE / max(height, width)
    if factor >= 1:
        return rgb
    size = max(round(width * factor), 1), max(round(height * factor), 1)
    return np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8)


def picture(found: Detections, reduced_image: RGB) -> str:
    """Return the picture with masks and boxes; a box shows its label when hovered or focused.

    Args:
        found: the detections, of any size of the same picture.
        reduced_image: uint8 RGB ``[H, W, 3]``, see `reduced`.
    """
    height, width = reduced_image.shape[:2]
    fitted = found.resized(height, width)
    buffer = io.BytesIO()
    fitted.draw(reduced_image, labels=False).save(buffer, "JPEG", quality=QUALITY)
    source = b64encode(buffer.getvalue()).decode()
    boxes = zip(found.class_names, found.scores.tolist(), fitted.boxes.tolist(), strict=True)
    # Small boxes come last, so that a large one does not hide them from the pointer.
    ordered = sorted(boxes, key=lambda box: _area(box[2]), reverse=True)
    parts = [_box(name, score, corners, (height, width)) for name, score, corners in ordered]
    image = f'<img src="data:image/jpeg;base64,{source}" alt="{_count(len(found))}">'
    return f'{STYLE}<div class="zoo-picture">{image}{"".join(parts)}</div>'


def table(found: Detections) -> str:
    """Return the detections as a table, best score first."""
    if not len(found):
        return '<p class="zoo-note">Nothing has this score. Move the slider to the left.</p>'
    lines = [
        f"<tr><td>{_escaped(name)}</td><td>{score:.2f}</td><td>{_corners(box)}</td>"
        f"<td>{area:,}</td></tr>"
        for name, score, box, area in zip(
            found.class_names,
            found.scores.tolist(),
            found.boxes.tolist(),
            found.mask_areas(),
            strict=True,
        )
    ]
    head = "<tr><th>class</th><th>score</th><th>x1 y1 x2 y2</th><th>mask, pixels</th></tr>"
    return (
        f"<p>{_count(len(found))}</p>"
        f'<div class="zoo-scroll"><table class="zoo-table"><thead>{head}</thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def note(message: str) -> str:
    """Return a sentence to show instead of the picture."""
    return f'{STYLE}<p class="zoo-note" role="alert">{html.escape(message)}</p>'


def _box(name: str, score: float, corners: list[float], size: tuple[int, int]) -> str:
    height, width = size
    x1, y1, x2, y2 = corners
    left, top = 100 * x1 / width, 100 * y1 / height
    wide, high = 100 * (x2 - x1) / width, 100 * (y2 - y1) / height
    side = "right" if left + wide / 2 > EDGE else "left"
    place = f"left:{left:.2f}%;top:{top:.2f}%;width:{wide:.2f}%;height:{high:.2f}%"
    label = f"{_escaped(name)} {score:.2f}"
    return (
        f'<div class="zoo-box" tabindex="0" aria-label="{label}" style="{place}">'
        f'<span style="{side}:0">{label}</span></div>'
    )


def _area(box: list[float]) -> float:
    x1, y1, x2, y2 = box
    return (x2 - x1) * (y2 - y1)


def _corners(box: list[float]) -> str:
    return " ".join(f"{value:.0f}" for value in box)


def _count(number: int) -> str:
    return "1 detection" if number == 1 else f"{number} detections"


def _escaped(name: str) -> str:
    return html.escape(shown(name, NAME))
