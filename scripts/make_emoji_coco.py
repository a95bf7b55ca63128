"""Render the emoji data set: COCO-format images with exact instance masks.

The objects are glyphs of Noto Color Emoji, the backgrounds photos that scikit-image's and
scikit-learn's wheels carry, and procedural textures. Nothing is downloaded. Each image has a
random generator of its own, seeded by (seed, split, index): the result does not depend on the
number of workers, and a smaller data set is the beginning of a larger one.

    apt-get install fonts-noto-color-emoji
    pip install scikit-image scikit-learn
    python scripts/make_emoji_coco.py OUT --train 25000 --val 200 --seed 0 --workers 2
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from emoji_scenes import CLASSES, FONT, Instance, Mask, Renderer

from vitadapter_zoo.catalog import COCO_CATEGORY_IDS, COCO_CLASSES

SPLITS = ("train", "val")
JPEG_QUALITY = 80
CATEGORIES = [{"id": COCO_CATEGORY_IDS[COCO_CLASSES.index(name)], "name": name} for name in CLASSES]

_renderers: dict[tuple[str, Path], Renderer] = {}  # one per process: glyphs and photos stay loaded


def run_length_counts(mask: Mask) -> list[int]:
    """COCO's run lengths of a mask ``[H, W]``, column by column, zeros first."""
    flat = mask.T.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = np.concatenate([[0], changes, [flat.size]])
    counts = np.diff(edges).tolist()
    return [0, *counts] if flat[0] else counts


def compressed(counts: list[int]) -> str:
    """COCO's compressed run lengths: differences to the count two before, five bits a character."""
    characters = []
    for index, count in enumerate(counts):
        value = count - counts[index - 2] if index > 2 else count
        while True:
            group = value & 0x1F
            value >>= 5
            last = value == (-1 if group & 0x10 else 0)
            characters.append(chr((group if last else group | 0x20) + 48))
            if last:
                break
    return "".join(characters)


def annotation(instance: Instance) -> dict[str, Any]:
    """The instance as COCO writes it, without its ids."""
    height, width = instance.mask.shape
    rows = np.flatnonzero(instance.mask.any(1))
    columns = np.flatnonzero(instance.mask.any(0))
    top, left = int(rows[0]), int(columns[0])
    return {
        "category_id": CATEGORIES[instance.label]["id"],
        "iscrowd": int(instance.crowd),
        "area": int(instance.mask.sum()),
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "segmentation": {
            "size": [height, width],
            "counts": compressed(run_length_counts(instance.mask)),
        },
    }


def render(
    index: int, *, split: str, seed: int, font: Path, folder: Path
) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """Write one image; return its record, its annotations and the file's SHA-256."""
    key = (split, font)
    if key not in _renderers:
        _renderers[key] = Renderer(split, font)
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    scene = _renderers[key].scene(rng)
    height, width = scene.image.shape[:2]
    name = f"{index:06d}.jpg"
    bgr = cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR)
    encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()
    (folder / name).write_bytes(encoded)
    record = {"id": index + 1, "file_name": name, "height": height, "width": width}
    annotations = [annotation(instance) for instance in scene.instances if instance.mask.any()]
    return record, annotations, hashlib.sha256(encoded).hexdigest()


def make_split(
    out: Path, split: str, count: int, *, seed: int, workers: int, font: Path = FONT
) -> str:
    """Render ``count`` images of a split into ``out``.

    Returns:
        The split's SHA-256: of the images' hashes in order and of the annotation file.
    """
    folder = out / split
    folder.mkdir(parents=True, exist_ok=True)
    work = partial(render, split=split, seed=seed, font=font, folder=folder)
    if workers > 1:
        # Unlike multiprocessing.Pool, this raises an error when a process is killed.
        with ProcessPoolExecutor(workers) as pool:
            results = list(pool.map(work, range(count), chunksize=16))
    else:
        results = [work(index) for index in range(count)]
    annotations: list[dict[str, Any]] = []
    for record, found, _ in results:
        for entry in found:
            annotations.append({"id": len(annotations) + 1, "image_id": record["id"], **entry})
    content = {
        "info": {
            "description": f"emoji scenes, {split}, seed {seed}; see scripts/make_emoji_coco.py"
        },
        "licenses": [{"id": 1, "name": "SIL Open Font License 1.1 (glyphs); see LICENSE.md"}],
        "images": [record for record, _, _ in results],
        "annotations": annotations,
        "categories": CATEGORIES,
    }
    text = json.dumps(content, separators=(",", ":")).encode()
    (out / "annotations").mkdir(exist_ok=True)
    (out / "annotations" / f"instances_{split}.json").write_bytes(text)
    whole = hashlib.sha256()
    for _, _, digest in results:
        whole.update(bytes.fromhex(digest))
    whole.update(hashlib.sha256(text).digest())
    return whole.hexdigest()


def main() -> None:
    """Read the command line and render both splits."""
    parser = argparse.ArgumentParser(description="Render the emoji data set in COCO's format.")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write into")
    parser.add_argument("--train", type=int, default=25000, help="training images")
    parser.add_argument("--val", type=int, default=200, help="validation images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf")
    options = parser.parse_args()
    if min(options.train, options.val) < 0 or options.workers < 1:
        parser.error("--train and --val are 0 or more, --workers 1 or more")
    for split, count in (("train", options.train), ("val", options.val)):
        if count:
            digest = make_split(
                options.out,
                split,
                count,
                seed=options.seed,
                workers=options.workers,
                font=options.font,
            )
            print(f"{split}: {count} images, sha256 {digest}")


if __name__ == "__main__":
    main()
