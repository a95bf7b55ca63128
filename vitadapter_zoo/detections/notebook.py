"""How a Python prompt or a notebook shows detections: two lines, a picture, a table."""

from __future__ import annotations

import html
import io
from base64 import b64encode
from collections import Counter
from typing import TYPE_CHECKING

from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.text import shown

if TYPE_CHECKING:
    from vitadapter_zoo.detections import Detections

SIDE = 800  # pixels of the longest side of a picture
ROWS = 20  # of the table
NAMED = 4  # classes in the first line
NAME = 40  # characters of a class's name


def text(found: Detections) -> str:
    """Return two lines: the count of each class, and the best detections."""
    height, width = found.size
    counts = Counter(found.class_names)
    named = [f"{number} {shown(name, NAME)}" for name, number in counts.most_common(NAMED)]
    if len(counts) > NAMED:
        named.append(f"{len(counts) - NAMED} other classes")
    listed = ", ".join(named) or "nothing found"
    first = f"Detections({len(found)} in {width} x {height} pixels: {listed})"
    if not len(found):
        return f"{first}\n  a lower score_threshold shows what scored less"
    best = int(found.scores.argmax())
    box = ", ".join(f"{value:.0f}" for value in found.boxes[best].tolist())
    name = shown(found.class_names[best], NAME)
    return f"{first}\n  best: {name} {found.scores[best]:.2f} in the box ({box})"


def png(found: Detections) -> bytes | None:
    """Return the drawn picture, at most 800 pixels wide and high; None if the image is unknown."""
    if found.image is None:
        return None
    try:
        picture = found.draw()
    except ZooError:  # the file is gone: the two lines have to do
        return None
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def page(found: Detections) -> str | None:
    """Return the picture and a table of the best detections; None if the image is unknown."""
    picture = png(found)
    if picture is None:
        return None
    scored = list(zip(found.class_names, found.scores.tolist(), strict=True))
    rows = "".join(
        f"<tr><td>{html.escape(shown(name))}</td><td>{score:.2f}</td></tr>"
        for name, score in scored[:ROWS]
    )
    if len(scored) > ROWS:
        rows += f"<tr><td>and {len(scored) - ROWS} more</td><td></td></tr>"
    source = b64encode(picture).decode()
    caption = html.escape(text(found).partition("\n")[0])
    return (
        f'<img src="data:image/png;base64,{source}" alt="{caption}">'
        f"<table><tr><th>class</th><th>score</th></tr>{rows}</table>"
    )
