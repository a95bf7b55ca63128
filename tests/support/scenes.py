"""Generating small data sets in COCO's format, and detectors that find objects in them."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import standins
import torch
from hotcoco import mask as coco_mask

from vitadapter_zoo import MaskRCNN, get_row
from vitadapter_zoo.catalog import COCO_CATEGORY_IDS, COCO_CLASSES
from vitadapter_zoo.models import build

SMALL = (64, 40)  # (longest, shortest) side in the network; few proposals make it fast


def small(model: MaskRCNN, input_size: tuple[int, int] = SMALL) -> MaskRCNN:
    """Copy a detector with stand-in weights, for small inputs and with fewer detections."""
    with torch.device("meta"):
        copy = build(replace(model.row, input_size=input_size), model.categories)
    weights = {**model.state_dict()}
    bias = weights["roi_head.bbox_head.fc_cls.bias"].clone()
    bias[-1] += 7  # the last class is the background
    copy.load_state_dict(weights | {"roi_head.bbox_head.fc_cls.bias": bias}, assign=True)
    return copy.eval()


def narrow() -> MaskRCNN:
    """A narrow detector of COCO's classes with stand-in weights, for small inputs."""
    with torch.device("meta"):
        model = build(replace(get_row("adapter-n-emoji"), input_size=SMALL), COCO_CLASSES)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    weights = {name: standins.tensor(name, shape) for name, shape in shapes.items()}
    weights["roi_head.bbox_head.fc_cls.bias"][-1] += 7  # fewer detections, as in `small`
    model.load_state_dict(weights, assign=True)
    return model.eval()


def text(counts: bytes | str) -> str:
    """Convert RLE counts to text for JSON."""
    return counts.decode() if isinstance(counts, bytes) else counts


def draw_pictures(
    folder: Path, count: int, seed: int = 0, size: tuple[int, int] | None = None
) -> list[Path]:
    """Write JPEG files with coloured ellipses, all of one (height, width) or of several."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    paths = []
    for index in range(count):
        height, width = size or (int(side) for side in rng.integers(60, 200, 2))
        picture = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
        for _ in range(6):
            centre = (int(rng.integers(width)), int(rng.integers(height)))
            axes = tuple(int(side) for side in rng.integers(5, 40, 2))
            color = tuple(int(c) for c in rng.integers(80, 255, 3))
            angle = float(rng.integers(180))
            cv2.ellipse(picture, centre, axes, angle, 0, 360, color, -1)
        path = folder / f"{index * 7 + 3:012d}.jpg"
        cv2.imwrite(str(path), picture)
        paths.append(path)
    return paths


def make_video(path: Path, frames: int, size: tuple[int, int] = (48, 64)) -> Path:
    """A video whose frames differ in brightness."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10, size[::-1])
    assert writer.isOpened()
    for number in range(frames):
        writer.write(np.full((*size, 3), 20 * number + 10, np.uint8))
    writer.release()
    return path


def annotate(model: MaskRCNN, pictures: Sequence[Path], seed: int = 0) -> dict[str, Any]:
    """Create annotations from the model's own detections, some of them removed or moved.

    Image ids are the numbers in the file names. The last image has no objects.
    """
    rng = np.random.default_rng(seed)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for path in pictures:
        detections = model.predict(path)[0]
        height, width = detections.masks.shape[1:]
        image_id = int(path.stem)
        images.append(
            {"id": image_id, "file_name": path.name, "height": int(height), "width": int(width)}
        )
        if path == pictures[-1]:
            continue
        for found in detections.to_coco(image_id):
            if rng.random() < 0.5 or coco_mask.area(found["segmentation"]) == 0:
                continue
            if rng.random() < 0.3:  # matches only at the lower IoU thresholds
                pixels = np.asarray(coco_mask.decode(found["segmentation"]))
                moved = np.asfortranarray(np.roll(pixels, int(rng.integers(1, 6)), axis=1))
                found["segmentation"]["counts"] = text(coco_mask.encode(moved)["counts"])
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": found["category_id"],
                    "bbox": [float(x) for x in coco_mask.to_bbox(found["segmentation"])],
                    "area": float(coco_mask.area(found["segmentation"])),
                    "iscrowd": 0,
                    "segmentation": found["segmentation"],
                }
            )
    categories = [
        {"id": key, "name": name} for key, name in zip(COCO_CATEGORY_IDS, COCO_CLASSES, strict=True)
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(root: Path, model: MaskRCNN, count: int, seed: int = 0) -> Path:
    """Create a folder in COCO's layout with ``count`` images and return it."""
    pictures = draw_pictures(root / "val2017", count, seed)
    annotations = root / "annotations" / "instances_val2017.json"
    annotations.parent.mkdir(parents=True, exist_ok=True)
    annotations.write_text(json.dumps(annotate(model, pictures, seed)))
    return root


def validation_images(root: Path, count: int) -> Path:
    """Copy the first ``count`` validation images of the package to a folder in COCO's layout."""
    files = get_row("adapter-n-emoji").data_files
    assert files is not None
    content = json.loads(files[0].read_text())
    content["images"] = content["images"][:count]
    known = {image["id"] for image in content["images"]}
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] in known]
    (root / "annotations").mkdir(parents=True)
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    (root / "val2017").mkdir()
    for image in content["images"]:
        shutil.copy(files[1] / image["file_name"], root / "val2017")
    return root
