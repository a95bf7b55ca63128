"""The images with the most mistakes, and pictures of the mistakes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from hotcoco import mask as coco_mask
from PIL import Image, ImageDraw, ImageFont

from vitadapter_zoo.errors import ImageError
from vitadapter_zoo.evaluation import ids
from vitadapter_zoo.evaluation.annotation_file import Object
from vitadapter_zoo.evaluation.ids import Id
from vitadapter_zoo.evaluation.run import ImageResult
from vitadapter_zoo.evaluation.scoring import Annotations, Unmatched
from vitadapter_zoo.evaluation.verdict import Verification
from vitadapter_zoo.images import RGB, read_image, stored_pixels
from vitadapter_zoo.text import shown

SCORE = 0.3  # lowest score of a detection that counts, as in `vitadapter-zoo predict`
SHOWN = 8
LONGEST_SIDE = 480  # pixels of a picture
TEXT_HEIGHT = 14
LONGEST_LABEL = 40  # characters of a class name
PICTURE_BYTES = 2_000_000  # of all pictures together, so that the page can be mailed
GOOD, FALSE, MISSED, CROWD = (72, 199, 116), (255, 92, 92), (255, 179, 64), (170, 170, 170)


@dataclass(frozen=True)
class WorstImage:
    """An image and the numbers of mistakes in it.

    Attributes:
        image_id: the annotation file's.
        file_name: inside the folder of images.
        objects: number of annotated objects, without crowds.
        missed: number of objects that no detection of their class matches at mask IoU 0.5.
        false: number of detections that match no object.
    """

    image_id: Id
    file_name: str
    objects: int
    missed: int
    false: int


@dataclass(frozen=True)
class _Outline:
    """An object to draw: RLE, ``[x, y, width, height]`` in image pixels, text, RGB."""

    rle: dict[str, Any]
    box: Sequence[float]
    text: str
    color: tuple[int, int, int]


@dataclass(frozen=True)
class Pictures:
    """Two JPEG files of an image: one with its annotations, one with the detections."""

    annotations: bytes
    detections: bytes


def worst(found: Verification) -> list[tuple[WorstImage, Pictures | str]]:
    """Return the images with the most mistakes, the worst first.

    A mistake is an object that no detection of its class with a score of at least 0.3 matches at
    mask IoU 0.5, or such a detection that matches no object. Images with the same number of
    mistakes are ordered by id.

    Args:
        found: an evaluation.

    Returns:
        At most 8 images, each with pictures or the reason why there are none.
    """
    results = [_confident(result) for result in found.results]
    annotations = Annotations(found.data)
    judged = zip(results, annotations.unmatched(results, "mask"), strict=True)
    ranked = sorted(
        judged,
        key=lambda pair: (-len(pair[1].missed) - len(pair[1].false), ids.order(pair[0].image_id)),
    )
    names = {key: shown(name, LONGEST_LABEL) for key, name in found.data.categories}
    paths = {image.image_id: image.path for image in found.data.images}
    chosen: list[tuple[WorstImage, Pictures | str]] = []
    room = PICTURE_BYTES
    for result, unmatched in ranked[:SHOWN]:
        if not (unmatched.missed or unmatched.false):
            break
        objects = [one for one in found.data.objects if one.image_id == result.image_id]
        mistakes = WorstImage(
            image_id=result.image_id,
            file_name=_inside(paths[result.image_id], found.data.folder),
            objects=sum(not one.is_crowd for one in objects),
            missed=len(unmatched.missed),
            false=len(unmatched.false),
        )
        drawn = _pictures(found, mistakes.file_name, result, unmatched, objects, names)
        if isinstance(drawn, Pictures):
            room -= len(drawn.annotations) + len(drawn.detections)
            drawn = drawn if room >= 0 else "the page has reached its limit for pictures"
        chosen.append((mistakes, drawn))
    return chosen


def _inside(path: Path, folder: Path) -> str:
    """Return the path as the annotation file writes it."""
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def _confident(result: ImageResult) -> ImageResult:
    kept = [place for place, score in enumerate(result.scores) if score >= SCORE]
    return replace(
        result,
        boxes=[result.boxes[place] for place in kept],
        scores=[result.scores[place] for place in kept],
        category_ids=[result.category_ids[place] for place in kept],
        masks=[result.masks[place] for place in kept],
    )


def _pictures(
    found: Verification,
    file_name: str,
    result: ImageResult,
    unmatched: Unmatched,
    objects: Sequence[Object],
    names: Mapping[Id, str],
) -> Pictures | str:
    if found.images is None:
        return "the images were not given"
    path: Path = found.images / file_name
    try:
        rgb = stored_pixels(path.read_bytes()) if found.data.ignore_exif else read_image(path)
    except OSError as error:
        return f"cannot read the image {shown(path, 300)}: {error.strerror}"
    except ImageError as error:
        return str(error)
    if rgb.shape[:2] != result.size:
        return f"{shown(path, 300)} is not the annotated image: its size differs"
    annotated = [
        _Outline(
            {"size": list(result.size), "counts": one.mask},
            one.box,
            names[one.category_id],
            CROWD if one.is_crowd else MISSED if one.annotation_id in unmatched.missed else GOOD,
        )
        for one in objects
    ]
    detected = [
        _Outline(
            segmentation, box, f"{names[category]} {score:.2f}",
            FALSE if place in unmatched.false else GOOD,
        )
        for place, (segmentation, box, category, score) in enumerate(
            zip(
                result.segmentations(), result.boxes, result.category_ids, result.scores,
                strict=True,
            )
        )
    ]  # fmt: skip
    return Pictures(_drawn(rgb, annotated), _drawn(rgb, detected))


def _drawn(rgb: RGB, outlines: Sequence[_Outline]) -> bytes:
    """The image as JPEG of 480 pixels, with masks and texts; mistakes and small objects on top."""
    height, width = rgb.shape[:2]
    scale = LONGEST_SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    shrinks = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    canvas = cv2.resize(rgb, size, interpolation=shrinks)
    layer = canvas.copy()
    ordered = sorted(outlines, key=lambda one: (one.color in (FALSE, MISSED), -_area(one)))
    edges = []
    for one in ordered:
        pixels = np.asarray(coco_mask.decode(one.rle), np.uint8)
        inside = cv2.resize(pixels, size, interpolation=cv2.INTER_NEAREST)
        layer[inside > 0] = one.color
        edges.append(cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0])
    canvas = cv2.addWeighted(canvas, 0.65, layer, 0.35, 0)
    for one, contours in zip(ordered, edges, strict=True):
        cv2.drawContours(canvas, contours, -1, one.color, 1)
    picture = Image.fromarray(canvas)
    _write_texts(picture, ordered[::-1], scale)
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=80)
    return encoded.getvalue()


def _area(one: _Outline) -> float:
    return float(one.box[2] * one.box[3])


def _write_texts(picture: Image.Image, outlines: Sequence[_Outline], scale: float) -> None:
    """Write a text at each box's upper left corner, unless it would cover an earlier text."""
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default()
    taken: list[tuple[float, float, float, float]] = []
    for one in outlines:
        width = draw.textlength(one.text, font=font) + 4
        x = max(0.0, min(one.box[0] * scale, picture.width - width))
        y = max(0.0, one.box[1] * scale - TEXT_HEIGHT)
        place = (x, y, x + width, y + TEXT_HEIGHT)
        if any(_overlap(place, other) for other in taken):
            continue
        taken.append(place)
        draw.rectangle(place, fill=one.color)
        draw.text((x + 2, y + 1), one.text, fill=(0, 0, 0), font=font)


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    left, top, right, bottom = one
    return left < other[2] and other[0] < right and top < other[3] and other[1] < bottom
