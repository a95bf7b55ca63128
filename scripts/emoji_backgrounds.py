"""Backgrounds of the emoji data set: crops of photos and procedural textures.

No background holds an object of a class. The photos come from the wheels of scikit-image and
scikit-learn, so nothing is downloaded; the validation photos are never used for training.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.float32]
"""float32 ``[H, W, 3]``, RGB in 0..255."""

Box = tuple[int, int, int, int]

# (package, file, the part that is used as left, top, right, bottom). Left out for good: coffee.png
# (a cup), chelsea.png (a cat), clock_motion.png, horse.png, the motorcycle pair. The astronaut is
# cut before the space shuttle, the Chinese tower before the lake with its boats.
PHOTOS: dict[str, tuple[tuple[str, str, Box | None], ...]] = {
    "train": (
        ("skimage", "astronaut.png", (0, 0, 345, 512)),
        ("sklearn", "china.jpg", (0, 0, 345, 427)),
        ("skimage", "camera.png", None),
        ("skimage", "brick.png", None),
        ("skimage", "grass.png", None),
        ("skimage", "gravel.png", None),
        ("skimage", "hubble_deep_field.jpg", None),
        ("skimage", "ihc.png", None),
        ("skimage", "moon.png", None),
        ("skimage", "retina.jpg", None),
        ("skimage", "page.png", None),
    ),
    "val": (
        ("skimage", "rocket.jpg", None),
        ("sklearn", "flower.jpg", None),
        ("skimage", "coins.png", None),
        ("skimage", "text.png", None),
    ),
}
LONGEST_SIDE = 640  # larger photos are reduced to this many pixels once


def photos(split: str) -> list[npt.NDArray[np.uint8]]:
    """The photos of ``"train"`` or ``"val"``, uint8 RGB.

    Raises:
        SystemExit: scikit-image or scikit-learn is missing, or lacks one of the photos.
    """
    found = []
    for package, name, box in PHOTOS[split]:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(
                f"the backgrounds need the package {package}: pip install scikit-image scikit-learn"
            )
        folder = "data" if package == "skimage" else "datasets/images"
        path = Path(spec.origin).parent / folder / name
        bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if bgr is None:
            raise SystemExit(f"{package} has no readable {path}: install another version of it")
        rgb = np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)
        if box is not None:
            rgb = rgb[box[1] : box[3], box[0] : box[2]]
        factor = LONGEST_SIDE / max(rgb.shape[:2])
        if factor < 1:
            rgb = np.asarray(
                cv2.resize(rgb, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA), np.uint8
            )
        found.append(rgb)
    return found


def background(
    rng: np.random.Generator,
    height: int,
    width: int,
    pictures: list[npt.NDArray[np.uint8]],
) -> Image:
    """One background: a crop of a photo or a texture, at times with shapes or a light flare."""
    if rng.random() < 0.5:
        canvas = _photo(rng, height, width, pictures)
    else:
        texture = (_fractal, _gradient, _stripes, _cells, _blobs)[rng.integers(5)]
        canvas = texture(rng, height, width)
    if rng.random() < 0.25:
        _draw_shapes(rng, canvas)
    if rng.random() < 0.12:
        _add_flare(rng, canvas)
    return canvas


def colour(rng: np.random.Generator) -> Image:
    """A random RGB colour, float32 ``[3]`` in 0..255; grey tones are as likely as bright ones."""
    value = rng.uniform(20, 245)
    return np.asarray(np.clip(value + rng.normal(0, 1, 3) * rng.uniform(5, 75), 0, 255), np.float32)


def _photo(
    rng: np.random.Generator, height: int, width: int, pictures: list[npt.NDArray[np.uint8]]
) -> Image:
    picture = pictures[rng.integers(len(pictures))]
    rows, columns = picture.shape[:2]
    # Crop pixels per image pixel: from a magnified detail to as much as the photo holds.
    step = min(rows / height, columns / width) * rng.uniform(0.45, 1.0)
    crop_height, crop_width = int(height * step), int(width * step)
    top = int(rng.integers(rows - crop_height + 1))
    left = int(rng.integers(columns - crop_width + 1))
    crop = picture[top : top + crop_height, left : left + crop_width]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    method = cv2.INTER_AREA if step > 1 else cv2.INTER_LINEAR
    canvas = np.asarray(
        cv2.resize(np.ascontiguousarray(crop), (width, height), interpolation=method), np.float32
    )
    if rng.random() < 0.4:  # a tint: many of the photos are grey
        canvas *= colour(rng) / 128 * 0.5 + 0.5
    canvas = (canvas - 128) * np.float32(rng.uniform(0.5, 1.2)) + np.float32(rng.normal(128, 20))
    return np.clip(canvas, 0, 255)


def _noise(rng: np.random.Generator, height: int, width: int, channels: int = 1) -> Image:
    """Fractal value noise ``[H, W, channels]`` with a standard deviation of about 1."""
    roughness = rng.uniform(0.35, 0.75)
    total = np.zeros((height, width, channels), np.float32)
    weight, power, cells = 1.0, 0.0, 2
    while cells < min(height, width):
        grid = rng.normal(0, 1, (cells + 1, cells + 1, channels)).astype(np.float32)
        total += np.float32(weight) * cv2.resize(
            grid, (width, height), interpolation=cv2.INTER_CUBIC
        ).reshape(total.shape)
        power += weight**2
        weight, cells = weight * roughness, cells * 2
    return total / np.float32(power**0.5)


def _blend(share: Image, first: Image, second: Image) -> Image:
    """Mix two colours; ``share`` ``[H, W, 1]`` of the second, 0..1."""
    return np.asarray(first + (second - first) * share, np.float32)


def _fractal(rng: np.random.Generator, height: int, width: int) -> Image:
    share = 1 / (1 + np.exp(-1.5 * _noise(rng, height, width)))
    canvas = _blend(share, colour(rng), colour(rng))
    canvas += np.float32(rng.uniform(0, 25)) * _noise(rng, height, width, 3)
    return np.clip(canvas, 0, 255)


def _coordinates(rng: np.random.Generator, height: int, width: int) -> tuple[Image, Image]:
    """Coordinates in pixels along a random direction and across it, ``[H, W, 1]`` each."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    along = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
    across = y * np.float32(np.cos(angle)) - x * np.float32(np.sin(angle))
    return along[..., None], across[..., None]


def _gradient(rng: np.random.Generator, height: int, width: int) -> Image:
    along, across = _coordinates(rng, height, width)
    distance = along if rng.random() < 0.5 else np.hypot(along, across)
    share = (distance - distance.min()) / (np.ptp(distance) + 1e-6)
    canvas = _blend(share, colour(rng), colour(rng))
    canvas += np.float32(rng.uniform(0, 12)) * _noise(rng, height, width)
    return np.clip(canvas, 0, 255)


def _stripes(rng: np.random.Generator, height: int, width: int) -> Image:
    along, across = _coordinates(rng, height, width)
    period = np.exp(rng.uniform(np.log(6), np.log(70)))
    bend = np.float32(rng.uniform(0, 1.5)) * _noise(rng, height, width)
    wave = np.sin(along * np.float32(2 * np.pi / period) + bend)
    if rng.random() < 0.4:  # a checkerboard
        wave = wave * np.sin(across * np.float32(2 * np.pi / period))
    share = 1 / (1 + np.exp(-np.float32(rng.uniform(1, 12)) * wave))
    canvas = _blend(share, colour(rng), colour(rng))
    canvas += np.float32(rng.uniform(0, 15)) * _noise(rng, height, width)
    return np.clip(canvas, 0, 255)


def _cells(rng: np.random.Generator, height: int, width: int) -> Image:
    """A Voronoi diagram; found on a grid of half the resolution."""
    count = int(rng.integers(8, 60))
    points = rng.uniform(0, 1, (count, 2)) * (height, width)
    y, x = np.mgrid[0:height:2, 0:width:2].astype(np.float32)
    distances = (y[..., None] - points[:, 0].astype(np.float32)) ** 2
    distances += (x[..., None] - points[:, 1].astype(np.float32)) ** 2
    nearest = distances.argmin(-1).astype(np.uint8)
    nearest = cv2.resize(nearest, (width, height), interpolation=cv2.INTER_NEAREST)
    base, spread = colour(rng), rng.uniform(10, 60)
    palette = np.clip(base + rng.normal(0, spread, (count, 3)), 0, 255).astype(np.float32)
    canvas = palette[nearest]
    canvas += np.float32(rng.uniform(0, 15)) * _noise(rng, height, width)
    return np.clip(canvas, 0, 255)


def _blobs(rng: np.random.Generator, height: int, width: int) -> Image:
    edge = np.float32(rng.uniform(2, 15))
    share = 1 / (1 + np.exp(-edge * (_noise(rng, height, width) - np.float32(rng.normal(0, 0.5)))))
    return np.clip(
        _blend(share, _fractal(rng, height, width), _gradient(rng, height, width)), 0, 255
    )


def _draw_shapes(rng: np.random.Generator, canvas: Image) -> None:
    """Draw discs, boxes, triangles and bars, which look like objects and are none."""
    height, width = canvas.shape[:2]
    for _ in range(int(rng.integers(1, 9))):
        shade = tuple(float(value) for value in colour(rng))
        centre = (int(rng.integers(width)), int(rng.integers(height)))
        size = int(np.exp(rng.uniform(np.log(6), np.log(60))))
        kind = rng.integers(4)
        thickness = -1 if rng.random() < 0.7 else int(rng.integers(1, 6))
        if kind == 0:
            axes = (size, int(size * rng.uniform(0.4, 1)))
            angle = float(rng.uniform(0, 180))
            cv2.ellipse(canvas, centre, axes, angle, 0, 360, shade, thickness, cv2.LINE_AA)
        elif kind == 1:
            corner = (centre[0] + size, centre[1] + int(size * rng.uniform(0.3, 1.5)))
            cv2.rectangle(canvas, centre, corner, shade, thickness)
        elif kind == 2:
            corners = np.array(centre) + rng.integers(-size, size + 1, (3, 2))
            cv2.fillPoly(canvas, [corners.astype(np.int32)], shade, cv2.LINE_AA)
        else:
            end = (int(rng.integers(width)), int(rng.integers(height)))
            cv2.line(canvas, centre, end, shade, int(rng.integers(1, 8)), cv2.LINE_AA)


def _add_flare(rng: np.random.Generator, canvas: Image) -> None:
    height, width = canvas.shape[:2]
    y, x = np.ogrid[:height, :width]
    radius = rng.uniform(8, 80)
    squared = (y - rng.uniform(0, height)) ** 2 + (x - rng.uniform(0, width)) ** 2
    glow = np.exp(-squared / (2 * radius**2)).astype(np.float32)[..., None]
    canvas += glow * (colour(rng) * np.float32(0.6) + 80)
    np.clip(canvas, 0, 255, out=canvas)
