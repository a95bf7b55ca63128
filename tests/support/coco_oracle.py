"""Random annotations and results, and COCO's figures for them by pycocotools."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from hotcoco import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scenes import text

from vitadapter_zoo.evaluation.ids import Id, order
from vitadapter_zoo.evaluation.run import ImageResult
from vitadapter_zoo.evaluation.scoring import Kind


def encoded(pixels: np.ndarray) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(pixels.astype(np.uint8)))
    return {"size": [int(side) for side in rle["size"]], "counts": text(rle["counts"])}


def blob(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """An ellipse, small or large, that may reach over the border."""
    y, x = np.mgrid[:height, :width]
    reach = rng.choice([6, 25, 90])
    a, b = rng.uniform(2, reach, 2)
    cy, cx = rng.uniform(0, height), rng.uniform(0, width)
    return ((y - cy) / a) ** 2 + ((x - cx) / b) ** 2 <= 1


def random_data(
    seed: int, images: int = 30, classes: int = 6, crowded: bool = False
) -> tuple[dict[str, Any], list[ImageResult]]:
    """Annotations and results with everything that COCO's evaluation treats specially.

    Crowds, images without annotations or without detections, classes without objects, tied scores,
    ids with gaps and in no order, and, where ``crowded``, more than 100 detections in an image.
    """
    rng = np.random.default_rng(seed)
    category_ids = [int(key) for key in rng.permutation(90)[:classes] + 1]
    image_ids = [int(key) for key in rng.permutation(10_000)[:images]]
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": key, "name": f"class {key}"} for key in category_ids],
    }
    results = []
    for image_id in image_ids:
        height, width = (int(side) for side in rng.integers(40, 220, 2))
        content["images"].append(
            {"id": image_id, "file_name": f"{image_id}.jpg", "height": height, "width": width}
        )
        found: list[tuple[float, int, list[float], str]] = []
        for _ in range(int(rng.integers(0, 9))):
            pixels = blob(rng, height, width)
            if not pixels.any():
                continue
            rle = encoded(pixels)
            crowd = int(rng.random() < 0.15)
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) * 3 + 5,
                    "image_id": image_id,
                    "category_id": int(rng.choice(category_ids[:-1])),
                    "bbox": [float(v) for v in coco_mask.to_bbox(rle)],
                    "area": float(pixels.sum()),
                    "iscrowd": crowd,
                    "segmentation": rle,
                }
            )
            for _ in range(int(rng.integers(0, 4))):
                shift = tuple(int(s) for s in rng.integers(-3, 4, 2))
                moved = encoded(np.roll(pixels, shift, axis=(0, 1)))
                key = content["annotations"][-1]["category_id"]
                if rng.random() < 0.2:
                    key = int(rng.choice(category_ids))
                box = [float(v) + rng.normal(0, 1) for v in coco_mask.to_bbox(moved)]
                # Few distinct scores, so that many are tied.
                found.append((round(rng.random(), 1), key, box, moved["counts"]))
        if crowded:
            for _ in range(150):
                other = encoded(blob(rng, height, width))
                box = [float(v) for v in coco_mask.to_bbox(other)]
                found.append((round(rng.random(), 2), category_ids[0], box, other["counts"]))
        if rng.random() < 0.15:
            found = []
        found.sort(key=lambda one: -one[0])
        results.append(
            ImageResult(
                image_id,
                (height, width),
                boxes=[box for _, _, box, _ in found],
                scores=[score for score, _, _, _ in found],
                category_ids=[key for _, key, _, _ in found],
                masks=[counts for _, _, _, counts in found],
            )
        )
    return content, results


def written(content: dict[str, Any], folder: Path) -> Path:
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return path


def by_pycocotools(
    path: Path, results: list[ImageResult], kind: Kind, image_ids: list[Id] | None = None
) -> Any:
    """What pycocotools computes for an annotation file, on all images or on some."""
    detections = [one for result in results for one in result.to_coco()]
    return evaluated(json.loads(path.read_bytes()), detections, kind, image_ids)


def evaluated(
    content: dict[str, Any],
    detections: list[dict[str, Any]],
    kind: Kind,
    image_ids: list[Id] | None = None,
) -> Any:
    """What pycocotools computes for parsed files; masks are scored without boxes, by their size.

    It changes the dictionaries, as pycocotools does.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = content
        coco.createIndex()
        if kind == "mask":
            detections = [{k: v for k, v in one.items() if k != "bbox"} for one in detections]
        evaluation = COCOeval(coco, coco.loadRes(detections), "bbox" if kind == "box" else "segm")
        if image_ids is not None:
            evaluation.params.imgIds = sorted(image_ids, key=order)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation
