"""Small data sets to train on, made here: circles and squares on dark images, in every layout."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

CLASSES = ("circle", "square")
COLOURS = ((255, 80, 0), (0, 200, 255))  # BGR
SIDE = 64


def draw(path: Path, seed: int) -> list[tuple[int, list[float]]]:
    """One image with two shapes; (class, polygon in pixels) of each."""
    generator = np.random.default_rng(seed)
    image = np.full((SIDE, SIDE, 3), 40, np.uint8)
    shapes = []
    for half in range(2):
        radius = int(generator.integers(SIDE // 8, SIDE // 5))
        x = int(generator.integers(radius, SIDE // 2 - radius)) + half * SIDE // 2
        y = int(generator.integers(radius, SIDE - radius))
        kind = int(generator.integers(2))
        angles = np.linspace(0, 2 * np.pi, 24 if kind == 0 else 4, endpoint=False)
        if kind == 1:
            angles, radius = angles + np.pi / 4, int(radius * 1.4)
        points = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1)
        points = points.clip(0, SIDE)
        cv2.fillPoly(image, [points.round().astype(np.int32)], COLOURS[kind])
        shapes.append((kind, [float(value) for value in points.flatten()]))
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)
    return shapes


def annotations(folder: Path, count: int, first_id: int = 1) -> dict[str, Any]:
    """Images in ``folder`` and their annotations in COCO's format."""
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [
            {"id": first_id + label, "name": name, "supercategory": "shapes"}
            for label, name in enumerate(CLASSES)
        ],
    }
    for number in range(count):
        name = f"{number:03d}.png"
        content["images"].append({"id": number, "file_name": name, "height": SIDE, "width": SIDE})
        for kind, polygon in draw(folder / name, number):
            (x1, x2), (y1, y2) = ((min(part), max(part)) for part in (polygon[0::2], polygon[1::2]))
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number,
                    "category_id": first_id + kind,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                    "segmentation": [polygon],
                }
            )
    return content


def write(path: Path, content: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def roboflow(root: Path, count: int = 4) -> Path:
    """As Roboflow exports COCO: a super-category 0 that nothing belongs to."""
    for part in ("train", "valid"):
        content = annotations(root / part, count)
        content["categories"].insert(0, {"id": 0, "name": "shapes", "supercategory": "none"})
        write(root / part / "_annotations.coco.json", content)
    return root


def coco(root: Path, count: int = 4) -> Path:
    """COCO's layout, with category ids that are not contiguous."""
    for part in ("train", "val"):
        content = annotations(root / f"{part}2017", count, first_id=7)
        content["categories"][1]["id"] = 90
        for one in content["annotations"]:
            one["category_id"] = 90 if one["category_id"] == 8 else 7
        write(root / "annotations" / f"instances_{part}2017.json", content)
    return root


def yolo(root: Path, count: int = 4) -> Path:
    """YOLO segmentation, with paths as Roboflow writes them."""
    for part in ("train", "valid"):
        for number in range(count):
            shapes = draw(root / part / "images" / f"{number:03d}.png", number)
            lines = [
                " ".join([str(kind), *(f"{value / SIDE:.6f}" for value in polygon)])
                for kind, polygon in shapes
            ]
            labels = root / part / "labels" / f"{number:03d}.txt"
            labels.parent.mkdir(parents=True, exist_ok=True)
            labels.write_text("\n".join(lines) + "\n")
    (root / "data.yaml").write_text(
        f"train: ../train/images\nval: ../valid/images\nnc: 2\nnames: {list(CLASSES)}\n"
    )
    return root
