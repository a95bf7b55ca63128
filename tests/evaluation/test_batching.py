"""Batch sizes on a GPU, and evaluation with several threads on each side of the network."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from vitadapter_zoo import MaskRCNN
from vitadapter_zoo.evaluation.batching import chosen_size, largest_input, size_that_fits
from vitadapter_zoo.evaluation.dataset import read_dataset
from vitadapter_zoo.evaluation.evaluator import Evaluator, stream, until
from vitadapter_zoo.evaluation.identity import run_identity, with_batch_size
from vitadapter_zoo.evaluation.run import ImageResult, has_begun, open_run
from vitadapter_zoo.evaluation.verdict import Verification

GIB = 2**30


@pytest.mark.parametrize(
    ("free", "per_image", "size"),
    [(139 * GIB, GIB, 8), (20 * GIB, GIB, 8), (19 * GIB, GIB, 4), (6 * GIB, GIB, 2), (GIB, GIB, 1)],
)
def test_the_batch_size_leaves_room_for_graphs(free: int, per_image: int, size: int) -> None:
    assert size_that_fits(free, per_image) == size


def test_on_the_cpu_images_are_computed_one_by_one(detector: MaskRCNN) -> None:
    assert chosen_size(detector) == 1


def test_the_largest_input_is_as_large_as_that_of_any_image(detector: MaskRCNN) -> None:
    assert largest_input(detector).tensor.dtype == torch.float32
    most = largest_input(detector).tensor.numel()
    for height, width in ((300, 300), (300, 500), (500, 300), (100, 900), (480, 640)):
        item = detector.preprocess(np.zeros((height, width, 3), np.uint8))
        assert item.tensor.numel() <= most


def test_a_run_is_found_again_by_its_batch_size(
    detector: MaskRCNN, coco: Path, tmp_path: Path
) -> None:
    data = read_dataset(coco / "annotations" / "instances_val2017.json", coco / "val2017")
    for size in (1, 4):
        identity = run_identity(detector, data, batch_size=size)
        assert repr(with_batch_size(run_identity(detector, data), size)) == repr(identity)
        assert ("batch_size" in identity) == (size > 1)
    assert not has_begun(tmp_path / "run", identity)
    with open_run(tmp_path / "run", identity):
        pass
    assert has_begun(tmp_path / "run", identity)
    assert not has_begun(tmp_path / "run", with_batch_size(identity, 1))
    (tmp_path / "run" / "run.json").write_text("{")
    assert not has_begun(tmp_path / "run", identity)


def test_several_threads_give_the_same_results(
    detector: MaskRCNN, coco: Path, undisturbed: Verification
) -> None:
    data = undisturbed.data
    evaluator = Evaluator(detector, data.category_ids(detector.categories))
    found: dict[object, ImageResult] = {}
    keeping = threading.Lock()

    def keep(result: ImageResult) -> None:
        assert keeping.acquire(blocking=False), "two results are kept at the same time"
        found[result.image_id] = result
        threading.Event().wait(0.01)
        keeping.release()

    images = data.images[:5]
    stream(evaluator, until(None, iter(images)), keep, decoders=3, encoders=3)
    expected = {result.image_id: result for result in undisturbed.results}
    assert set(found) == {image.image_id for image in images}
    for image_id, result in found.items():
        assert result == expected[image_id]  # type: ignore[index]
