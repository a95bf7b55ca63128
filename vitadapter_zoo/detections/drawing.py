"""Draw detections on a picture, in memory that grows with the objects and not with their number."""

import colorsys
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vitadapter_zoo.detections.masks import Masks, strips
from vitadapter_zoo.text import shown

# Distinct hues, taken in turn by label.
PALETTE = (
    "#ff6b6b", "#51cf66", "#ffd43b", "#74a9ff", "#ff922b", "#da77f2",
    "#66d9e8", "#f783ac", "#c0eb75", "#ffc9c9", "#63e6be", "#e0b080",
)  # fmt: skip
# Added to the lightness of the class's colour, for one instance after the other.
SHADES = (0.0, -0.18, 0.1, -0.28, 0.05, -0.1)
LINE = 0.003  # of the mean of height and width, at least 2 pixels
TEXT = 0.018  # likewise, at least 12
LONGEST_LABEL = 60  # characters

RGB = tuple[int, int, int]


def draw(
    canvas: npt.NDArray[np.uint8],
    boxes: Tensor,
    labels: Sequence[int],
    texts: Sequence[str],
    masks: Masks | None,
    alpha: float,
) -> Image.Image:
    """Draw masks, then boxes, then texts on the canvas, which is changed.

    Args:
        canvas: uint8 RGB ``[H, W, 3]``.
        boxes: float32 ``[N, 4]`` as (x1, y1, x2, y2) in pixels.
        labels: the class of each, which decides its hue.
        texts: one for each box, or none at all.
        masks: of the canvas's size; None draws no masks.
        alpha: how much of a mask's colour covers the canvas, 0..1.

    Returns:
        The picture.

    Raises:
        ValueError: ``alpha`` outside 0..1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in 0..1, got {alpha}")
    colors = instance_colors(labels)
    if masks is not None:
        _blend(canvas, masks, colors, alpha)
    picture = Image.fromarray(canvas)
    pen = ImageDraw.Draw(picture)
    mean_side = (canvas.shape[0] + canvas.shape[1]) / 2
    line = max(round(LINE * mean_side), 2)
    corners = _drawable(boxes)
    for corner, color in zip(corners, colors, strict=True):
        pen.rectangle(corner, outline=color, width=line)
    if texts:
        font = ImageFont.load_default(max(round(TEXT * mean_side), 12))
        for corner, color, text in zip(corners, colors, texts, strict=True):
            _write(pen, corner, shown(text, LONGEST_LABEL), color, font)
    return picture


def regions(boxes: Tensor, size: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Rows and columns of each box on an image of ``size`` (height, width), at least one pixel."""
    height, width = size
    found = []
    for x1, y1, x2, y2 in boxes.tolist():
        left, top = min(max(int(x1), 0), width - 1), min(max(int(y1), 0), height - 1)
        right = min(max(math.ceil(x2), left + 1), width)
        bottom = min(max(math.ceil(y2), top + 1), height)
        found.append((slice(top, bottom), slice(left, right)))
    return found


def instance_colors(labels: Sequence[int]) -> list[RGB]:
    """One colour per detection: the hue depends on the class, the shade on the instance."""
    seen: dict[int, int] = {}
    colors = []
    for label in labels:
        number = seen[label] = seen.get(label, -1) + 1
        code = PALETTE[label % len(PALETTE)]
        red, green, blue = (int(code[place : place + 2], 16) / 255 for place in (1, 3, 5))
        hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
        lightness = min(max(lightness + SHADES[number % len(SHADES)], 0), 1)
        shade = colorsys.hls_to_rgb(hue, lightness, saturation)
        colors.append((round(shade[0] * 255), round(shade[1] * 255), round(shade[2] * 255)))
    return colors


def _blend(
    canvas: npt.NDArray[np.uint8], masks: Masks, colors: Sequence[RGB], alpha: float
) -> None:
    values = np.arange(256, dtype=np.float32)
    for index, rows, columns, inside in strips(masks):
        region, chosen = canvas[rows, columns], inside.numpy()
        for channel, level in enumerate(colors[index]):
            table = np.rint(values * (1 - alpha) + alpha * level).astype(np.uint8)
            plane = region[..., channel]
            plane[chosen] = table[plane[chosen]]


def _drawable(boxes: Tensor) -> list[tuple[int, int, int, int]]:
    """The first and last pixels of each box; at least one pixel, which a box may not have."""
    corners = boxes.round().long().tolist()
    return [(x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)) for x1, y1, x2, y2 in corners]


def _write(
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int, int, int],
    text: str,
    color: RGB,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """A label on a ground of its colour: above the box's upper left corner, or inside of it."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    margin = max(round((bottom - top) * 0.2), 1)
    width, height = right - left + 2 * margin, bottom - top + 2 * margin
    x = max(min(corner[0], pen.im.size[0] - int(width)), 0)
    y = corner[1] - height if corner[1] >= height else corner[1]
    pen.rectangle((x, y, x + width - 1, y + height - 1), fill=color)
    # Rec. 601's luma: dark text on light colours.
    luma = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    ink = "black" if luma > 110 else "white"
    pen.text((x + margin - left, y + margin - top), text, fill=ink, font=font)
