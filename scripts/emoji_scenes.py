"""Scenes of the emoji data set: glyphs placed on a background, with exact visible masks.

The glyphs are drawn from Noto Color Emoji (SIL Open Font License 1.1).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from emoji_backgrounds import Image, background, photos
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

Mask = npt.NDArray[np.bool_]

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109  # the only size of this bitmap font

# COCO's names in COCO's order, with the glyphs that show them.
CLASSES: dict[str, str] = {
    "bicycle": "\U0001f6b2",
    "car": "\U0001f697\U0001f699\U0001f695",
    "airplane": "\u2708\U0001f6e9",
    "bus": "\U0001f68c",
    "boat": "\u26f5\U0001f6e5",
    "cat": "\U0001f408",
    "dog": "\U0001f415\U0001f429",
    "elephant": "\U0001f418",
    "giraffe": "\U0001f992",
    "umbrella": "\u2602",
    "sports ball": "\u26bd\U0001f3c0\U0001f3d0",
    "banana": "\U0001f34c",
    "apple": "\U0001f34e\U0001f34f",
    "carrot": "\U0001f955",
    "pizza": "\U0001f355",
    "donut": "\U0001f369",
    "clock": "\U0001f550\U0001f551\U0001f552\U0001f553\U0001f554\U0001f555"
    "\U0001f556\U0001f557\U0001f558\U0001f559\U0001f55a\U0001f55b\u23f0",
    "teddy bear": "\U0001f9f8",
}
# Classes that stay what they are in any colour; the others keep roughly their own.
ANY_COLOUR = {"car", "bus", "bicycle", "umbrella", "boat", "airplane"}
# Objects of no class, which the detector has to leave alone.
OTHERS: dict[str, str] = {
    "train": "\U0001f333\U0001f344\U0001f33b\U0001f3e0\U0001f511\U0001f381\U0001faa8\U0001f33d"
    "\U0001f45f\U0001f3b8\U0001f3a9\U0001faa3\U0001f341\u26fa\U0001f968\U0001f9f2\U0001f9e2"
    "\U0001f337\U0001f36a\U0001f95a\U0001f422\U0001f980\U0001f98b\U0001f4e6\U0001f388\U0001f48e",
    "val": "\U0001f335\U0001f347\U0001f9e6\U0001f514\U0001f5ff\U0001f41a\U0001f352\U0001f419"
    "\U0001f41e\U0001f6f4\U0001f383\U0001f5d1",
}

SHORT, LONG = 256, 320  # an image is as large as fits into LONG x SHORT
SIZES = (28.0, 180.0)  # longest side of an object in pixels, log-uniform
# Objects of an image, least and most. The training images are more crowded than the validation
# images: more objects for the same computing time.
COUNTS = {"train": (3, 9), "val": (1, 6)}
INSIDE = 0.7  # least share of an object within the image
VISIBLE = 0.6  # least share of it that later objects leave visible
SMALLEST_AREA = 80  # visible pixels
TRIES = 8


@dataclass
class Instance:
    """One annotation: the index of its class and the visible mask of the whole image."""

    label: int
    mask: Mask
    crowd: bool = False


@dataclass
class Scene:
    """A rendered image, uint8 RGB ``[H, W, 3]``, with its annotations."""

    image: npt.NDArray[np.uint8]
    instances: list[Instance]


@dataclass
class Layer:
    """A transformed glyph on its way into the image.

    Attributes:
        colour: premultiplied RGB, float32 ``[h, w, 3]`` in 0..255.
        alpha: float32 ``[h, w, 1]`` in 0..1.
        top, left: where it goes; parts may lie outside.
    """

    colour: Image
    alpha: Image
    top: int
    left: int


@dataclass
class Renderer:
    """Everything that the scenes of one split are made of, loaded once per process."""

    split: str
    font: Path = FONT
    pictures: list[npt.NDArray[np.uint8]] = field(init=False)
    glyphs: list[list[list[Image]]] = field(init=False)
    others: list[list[Image]] = field(init=False)

    def __post_init__(self) -> None:
        cv2.setNumThreads(1)
        if not self.font.is_file():
            raise SystemExit(
                f"no font at {self.font}: apt-get install fonts-noto-color-emoji, or give --font"
            )
        font = ImageFont.truetype(str(self.font), FONT_SIZE)
        self.pictures = photos(self.split)
        self.glyphs = [[_pyramid(font, char) for char in chars] for chars in CLASSES.values()]
        self.others = [_pyramid(font, char) for char in OTHERS[self.split]]

    def scene(self, rng: np.random.Generator) -> Scene:
        """Render one scene; the same generator state gives the same scene."""
        height, width = _image_size(rng)
        canvas = background(rng, height, width, self.pictures)
        instances: list[Instance] = []
        empty = rng.random() < 0.06
        least, most = COUNTS[self.split]
        if not empty and rng.random() < 0.04:
            instances.append(self._crowd(rng, canvas))
        for _ in range(int(rng.integers(0, 3)) if rng.random() < 0.4 else 0):
            levels = self.others[rng.integers(len(self.others))]
            self._place(rng, canvas, instances, levels, None)
        for _ in range(0 if empty else int(rng.integers(least, most + 1))):
            label = int(rng.integers(len(self.glyphs)))
            levels = self.glyphs[label][rng.integers(len(self.glyphs[label]))]
            self._place(rng, canvas, instances, levels, label)
        if rng.random() < 0.15:  # something in front
            levels = self.others[rng.integers(len(self.others))]
            self._place(rng, canvas, instances, levels, None)
        return Scene(_photograph(rng, canvas), instances)

    def _place(
        self,
        rng: np.random.Generator,
        canvas: Image,
        instances: list[Instance],
        levels: list[Image],
        label: int | None,
    ) -> None:
        """Draw a glyph where it leaves the earlier objects visible; give up after some tries."""
        size = float(np.exp(rng.uniform(*np.log(SIZES))))
        free_hue = label is not None and list(CLASSES)[label] in ANY_COLOUR
        layer = _recoloured(rng, _transformed(rng, levels, size), free_hue)
        height, width = canvas.shape[:2]
        solid = layer.alpha[..., 0] >= 0.5
        for _ in range(TRIES):
            layer.top = int(rng.integers(-(solid.shape[0] // 3), height - solid.shape[0] // 2))
            layer.left = int(rng.integers(-(solid.shape[1] // 3), width - solid.shape[1] // 2))
            mask = np.zeros((height, width), bool)
            target, source = _overlap(layer, height, width)
            mask[target] = solid[source]
            if mask.sum() < max(INSIDE * solid.sum(), SMALLEST_AREA):
                continue
            if all(_stays_visible(instance, mask) for instance in instances):
                break
        else:
            return
        if rng.random() < 0.2:
            _cast_shadow(rng, canvas, layer)
        _draw(canvas, layer)
        for instance in instances:
            instance.mask &= ~mask
        if label is not None:
            instances.append(_Placed(label, mask, area=int(mask.sum())))

    def _crowd(self, rng: np.random.Generator, canvas: Image) -> Instance:
        """Draw a dense group of tiny objects of one class; one mask holds them all."""
        height, width = canvas.shape[:2]
        label = int(rng.integers(len(self.glyphs)))
        spread = rng.uniform(25, 60)
        centre = rng.uniform(0.25, 0.75, 2) * (height, width)
        mask = np.zeros((height, width), bool)
        for _ in range(int(rng.integers(15, 41))):
            levels = self.glyphs[label][rng.integers(len(self.glyphs[label]))]
            layer = _recoloured(rng, _transformed(rng, levels, rng.uniform(10, 18)), False)
            row, column = rng.normal(0, spread, 2) * (0.6, 1.0) + centre
            layer.top = int(np.clip(row, 0, height - layer.alpha.shape[0]))
            layer.left = int(np.clip(column, 0, width - layer.alpha.shape[1]))
            target, source = _overlap(layer, height, width)
            mask[target] |= layer.alpha[source][..., 0] >= 0.5
            _draw(canvas, layer)
        return Instance(label, mask, crowd=True)


@dataclass
class _Placed(Instance):
    """An instance with the area that it had when it was drawn."""

    area: int = 0


def _image_size(rng: np.random.Generator) -> tuple[int, int]:
    """(height, width) of an image as large as fits into LONG x SHORT, either way up."""
    if rng.random() < 0.5:
        long, short = int(rng.integers(SHORT, LONG + 1)), SHORT
    else:
        long, short = LONG, int(rng.integers(SHORT * 3 // 4, SHORT + 1))
    return (short, long) if rng.random() < 0.7 else (long, short)


def _pyramid(font: ImageFont.FreeTypeFont, char: str) -> list[Image]:
    """A glyph, cut to its bounds, at full and halved sizes: premultiplied RGBA, float32 0..255."""
    tile = Pillow.new("RGBA", (200, 200))
    ImageDraw.Draw(tile).text((20, 20), char, font=font, embedded_color=True)
    bounds = tile.getbbox()
    if bounds is None:
        raise SystemExit(f"the font draws nothing for U+{ord(char):X}: use NotoColorEmoji.ttf")
    glyph = np.asarray(tile.crop(bounds), np.float32).copy()
    glyph[..., :3] *= glyph[..., 3:] / 255
    levels = [np.pad(glyph, ((2, 2), (2, 2), (0, 0)))]
    while min(levels[-1].shape[:2]) > 16:
        rows, columns = levels[-1].shape[:2]
        half = cv2.resize(levels[-1], (columns // 2, rows // 2), interpolation=cv2.INTER_AREA)
        levels.append(np.asarray(half, np.float32))
    return levels


def _transformed(rng: np.random.Generator, levels: list[Image], size: float) -> Layer:
    """Scale to ``size`` pixels, squeeze, shear, rotate and flip a glyph."""
    full = max(levels[0].shape[:2]) - 4
    level = max(index for index in range(len(levels)) if index == 0 or full / 2**index >= size)
    glyph = levels[level]
    rows, columns = glyph.shape[:2]
    scale = size / (full / 2**level)
    squeeze = np.exp(rng.normal(0, 0.08))
    angle = rng.uniform(-np.pi, np.pi) if rng.random() < 0.05 else rng.normal(0, np.radians(14))
    flip = -1.0 if rng.random() < 0.5 else 1.0
    shear = rng.normal(0, 0.07)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[flip * scale * squeeze, shear * scale], [0, scale / squeeze]])
    corners = matrix @ (np.array([[-1, 1, 1, -1], [-1, -1, 1, 1]]) * [[columns / 2], [rows / 2]])
    width, height = (int(value) + 1 for value in np.ptp(corners, axis=1))
    shift = np.array([width / 2, height / 2]) - matrix @ np.array([columns / 2, rows / 2])
    shift += 0.5 * (matrix.sum(1) - 1)  # pixel centres
    warped = cv2.warpAffine(
        glyph, np.column_stack([matrix, shift]), (width, height), flags=cv2.INTER_LINEAR
    )
    colours = np.asarray(warped[..., :3], np.float32)
    return Layer(colours, np.asarray(warped[..., 3:] / 255, np.float32), 0, 0)


def _recoloured(rng: np.random.Generator, layer: Layer, any_hue: bool) -> Layer:
    """Change hue, saturation, contrast and brightness by one linear map of the colours."""
    angle = rng.uniform(-np.pi, np.pi) if any_hue and rng.random() < 0.35 else rng.normal(0, 0.12)
    saturation = rng.uniform(0.55, 1.25)
    contrast = np.exp(rng.normal(0, 0.15))
    # Rotation about the grey axis (Rodrigues), then a pull towards or away from the grey mean.
    axis = np.full(3, 3**-0.5)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    turn = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * (cross @ cross)
    grey = np.full((3, 3), 1 / 3)
    matrix = contrast * (saturation * np.eye(3) + (1 - saturation) * grey) @ turn
    shift = 128 * (1 - contrast) + rng.normal(0, 15)
    coloured = cv2.transform(np.ascontiguousarray(layer.colour), matrix)
    coloured = np.asarray(coloured, np.float32) + np.float32(shift) * layer.alpha
    layer.colour = np.clip(coloured, 0, 255 * layer.alpha)
    return layer


def _overlap(
    layer: Layer, height: int, width: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where the layer meets the image, in the image's and in the layer's coordinates."""
    rows, columns = layer.alpha.shape[:2]
    top, left = max(layer.top, 0), max(layer.left, 0)
    bottom, right = min(layer.top + rows, height), min(layer.left + columns, width)
    target = (slice(top, max(bottom, top)), slice(left, max(right, left)))
    source = (
        slice(top - layer.top, max(bottom, top) - layer.top),
        slice(left - layer.left, max(right, left) - layer.left),
    )
    return target, source


def _draw(canvas: Image, layer: Layer) -> None:
    target, source = _overlap(layer, *canvas.shape[:2])
    canvas[target] = canvas[target] * (1 - layer.alpha[source]) + layer.colour[source]


def _cast_shadow(rng: np.random.Generator, canvas: Image, layer: Layer) -> None:
    size = max(layer.alpha.shape[:2])
    margin = size // 5 + 2
    alpha = cv2.copyMakeBorder(
        layer.alpha[..., 0], margin, margin, margin, margin, cv2.BORDER_CONSTANT
    )
    alpha = cv2.GaussianBlur(alpha, (0, 0), 0.5 + size * 0.04)
    down, right = (int(value) for value in rng.uniform(-0.1, 0.1, 2) * size)
    alpha = np.asarray(alpha, np.float32)[..., None] * np.float32(rng.uniform(0.2, 0.6))
    black = np.zeros((*alpha.shape[:2], 3), np.float32)
    _draw(canvas, Layer(black, alpha, layer.top - margin + down, layer.left - margin + right))


def _stays_visible(instance: Instance, cover: Mask) -> bool:
    """Whether enough of the instance is seen beside ``cover``."""
    if not isinstance(instance, _Placed):  # a crowd may be covered by half
        return bool((instance.mask & ~cover).sum() * 2 >= instance.mask.sum())
    left = int((instance.mask & ~cover).sum())
    return left >= max(VISIBLE * instance.area, SMALLEST_AREA)


def _photograph(rng: np.random.Generator, canvas: Image) -> npt.NDArray[np.uint8]:
    """What a camera adds: exposure, contrast, a little blur and noise."""
    contrast = np.float32(rng.uniform(0.75, 1.2))
    canvas = (canvas - 128) * contrast + np.float32(128 + rng.normal(0, 12))
    if rng.random() < 0.25:
        canvas = np.asarray(cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.3, 1.0)), np.float32)
    if rng.random() < 0.4:
        deviation = np.float32(rng.uniform(1, 9))
        canvas = canvas + deviation * rng.standard_normal(canvas.shape, np.float32)
    return np.asarray(np.clip(np.rint(canvas), 0, 255), np.uint8)
