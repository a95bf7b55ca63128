"""The data set in the package: what it holds, and that its masks are what its boxes say."""

import json
from pathlib import Path
from typing import Any

import cv2
import emoji_scenes
import make_emoji_coco
import numpy as np
import pytest
from hotcoco import mask as coco_mask

from vitadapter_zoo import get_row
from vitadapter_zoo.evaluation.dataset import row_dataset

ROW = get_row("adapter-n-emoji")
MEGABYTES = 3.0


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(row_dataset(ROW).annotations.read_text())
    return found


def test_it_has_the_row_s_classes_and_stays_small(content: dict[str, Any]) -> None:
    data = row_dataset(ROW)
    assert len(data.images) == 200
    assert tuple(name for _, name in data.categories) == ROW.classes == tuple(emoji_scenes.CLASSES)
    assert {one["category_id"] for one in content["annotations"]} == {
        key for key, _ in data.categories
    }
    files = [data.annotations, *(image.path for image in data.images)]
    assert sum(path.stat().st_size for path in files) < MEGABYTES * 1e6
    for image in data.images:
        pixels = cv2.imread(str(image.path))
        assert pixels is not None
        assert pixels.shape[:2] == image.size
        assert max(image.size) <= 320


def test_it_has_objects_of_all_sizes_crowds_and_empty_images(content: dict[str, Any]) -> None:
    areas = np.array([one["area"] for one in content["annotations"] if not one["iscrowd"]])
    assert (areas < 32**2).sum() > 50
    assert ((areas >= 32**2) & (areas < 96**2)).sum() > 50
    assert (areas >= 96**2).sum() > 10
    assert sum(one["iscrowd"] for one in content["annotations"]) >= 3
    empty = {image["id"] for image in content["images"]} - {
        one["image_id"] for one in content["annotations"]
    }
    assert len(empty) >= 5


def test_masks_are_apart_and_agree_with_boxes_and_areas(content: dict[str, Any]) -> None:
    taken: dict[int, Any] = {}
    for one in content["annotations"]:
        decoded = coco_mask.decode(one["segmentation"]).astype(bool)
        rows, columns = np.flatnonzero(decoded.any(1)), np.flatnonzero(decoded.any(0))
        left, top, width, height = one["bbox"]
        assert (top, top + height) == (rows[0], rows[-1] + 1)
        assert (left, left + width) == (columns[0], columns[-1] + 1)
        assert one["area"] == decoded.sum()
        earlier = taken.setdefault(one["image_id"], np.zeros_like(decoded))
        assert not (earlier & decoded).any()  # a mask is what is visible
        earlier |= decoded


def test_run_lengths_are_coco_s_own() -> None:
    rng = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.5, 1.0):
        wanted = rng.random((37, 211)) < share
        counts = make_emoji_coco.compressed(make_emoji_coco.run_length_counts(wanted))
        encoded = {"size": [37, 211], "counts": counts}
        assert (coco_mask.decode(encoded).astype(bool) == wanted).all()
        theirs = coco_mask.encode(np.asfortranarray(wanted.astype(np.uint8)))["counts"]
        assert counts == (theirs.decode() if isinstance(theirs, bytes) else theirs)


@pytest.mark.slow  # needs the font and the photos: apt-get install fonts-noto-color-emoji,
# pip install scikit-image scikit-learn
def test_rendering_is_bit_identical_whatever_the_workers(tmp_path: Path) -> None:
    for name, count, workers in (("one", 40, 1), ("two", 40, 2), ("other", 20, 1)):
        for split in make_emoji_coco.SPLITS:
            make_emoji_coco.make_split(tmp_path / name, split, count, seed=0, workers=workers)
    make_emoji_coco.make_split(tmp_path / "seed", "val", 20, seed=1, workers=1)

    def content(folder: str) -> dict[str, bytes]:
        root = tmp_path / folder
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file()
        }

    one = content("one")
    assert one == content("two")
    images = {name: image for name, image in content("other").items() if name.endswith(".jpg")}
    assert images == {name: one[name] for name in images}
    assert content("seed")["val/000000.jpg"] != one["val/000000.jpg"]
    assert one["train/000000.jpg"] != one["val/000000.jpg"]
