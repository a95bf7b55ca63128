"""The HTML of the web demo, and the models that it offers."""

import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import vitadapter_zoo
from vitadapter_zoo import Detections, MaskRCNN, UnknownModelError, ZooError, get_row
from vitadapter_zoo.detections.masks import MaskMaps
from vitadapter_zoo.web import overlay
from vitadapter_zoo.web.models import Models, Work, available
from vitadapter_zoo.weights import atomic, cache

BOXES = torch.tensor([[0.0, 0.0, 400.0, 200.0], [300.0, 50.0, 380.0, 90.0]])


def detections(name: str = "cat") -> Detections:
    maps = MaskMaps(torch.ones(2, 28, 28), BOXES, (200, 400))
    labels = torch.zeros(2, dtype=torch.int64)
    return Detections(BOXES, torch.tensor([0.9, 0.8]), labels, maps, (name,))


def test_boxes_are_placed_in_percent_and_small_ones_lie_on_top() -> None:
    page = overlay.picture(detections(), np.zeros((100, 200, 3), np.uint8))
    first, second = page.index("width:100.00%"), page.index("width:20.00%")
    assert first < second
    assert "left:75.00%;top:25.00%;width:20.00%;height:20.00%" in page
    assert page.index("left:0", first) < page.index("right:0", second)  # the label stays inside


def test_a_class_name_cannot_add_to_the_page() -> None:
    found = detections('<img src=x onerror="alert(1)">')
    page = overlay.picture(found, np.zeros((200, 400, 3), np.uint8)) + overlay.table(found)
    assert page.count("<img ") == 1
    assert 'onerror="' not in page
    assert "<b>" not in overlay.note("<b>")


def test_the_page_holds_a_reduced_picture() -> None:
    assert overlay.reduced(np.zeros((4000, 1000, 3), np.uint8)).shape == (1280, 320, 3)
    assert overlay.reduced(np.zeros((1, 9000, 3), np.uint8)).shape == (1, 1280, 3)
    assert overlay.reduced(np.zeros((20, 30, 3), np.uint8)).shape == (20, 30, 3)


def test_detections_are_resized_with_their_masks() -> None:
    whole = detections()
    small = whole.resized(100, 200)
    assert small.size == (100, 200)
    assert torch.equal(small.boxes, BOXES / 2)
    # A pasted mask is rounded at its corners.
    assert small.mask_areas() == pytest.approx([100 * 200, 40 * 20], rel=1e-3)
    dense = Detections(BOXES, whole.scores, whole.labels, whole.masks, whole.categories)
    assert dense.resized(100, 200).mask_areas() == pytest.approx([20_000, 800], rel=1e-3)
    assert dense[[]].resized(10, 20).masks.shape == (0, 10, 20)
    with pytest.raises(ValueError, match="cannot be resized to 0 x 10 pixels"):
        whole.resized(10, 0)


def test_models_in_the_package_in_the_cache_and_folders_are_offered(
    folder: Path, zoo_home: Path
) -> None:
    assert available() == ["adapter-n-emoji"]
    row = get_row("adapter-t-deit-3x")
    entry = cache.entry(row.name, row.checkpoint_url)
    entry.weights.parent.mkdir(parents=True)
    entry.weights.write_bytes(b"weights")
    facts = cache.Provenance(
        row.name, row.checkpoint_url, "", 1, None, "torch zip", atomic.sha256(entry.weights), 7,
        entry.weights.stat().st_mtime_ns, "2026-01-01", "1",
    )  # fmt: skip
    entry.write(facts)
    assert available([str(folder)]) == [str(folder), "adapter-n-emoji", "adapter-t-deit-3x"]
    with pytest.raises(UnknownModelError):
        available(["adapter-x"])


def test_one_model_is_kept(folder: Path, small: MaskRCNN) -> None:
    names = [str(folder), "adapter-n-emoji"]
    models = Models(names)
    image = np.full((64, 96, 3), 127, np.uint8)
    for name in (*names, names[0]):
        found = models.predict(name, image, 0.05)
        assert found.categories == vitadapter_zoo.load(name).categories
    with pytest.raises(UnknownModelError, match="does not offer the model 'vit-t-deit-3x'"):
        models.predict("vit-t-deit-3x", image, 0.05)


def test_without_gradio_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ZooError, match=r"pip install 'vitadapter-zoo\[web\]'"):
        vitadapter_zoo.web.build()


def test_stopping_waits_for_the_running_request_and_refuses_the_next() -> None:
    work, entered, leave = Work(), threading.Event(), threading.Event()

    def compute() -> None:
        with work.request():
            entered.set()
            leave.wait(60)

    computing = threading.Thread(target=compute)
    stopping = threading.Thread(target=work.stop)
    computing.start()
    assert entered.wait(60)
    stopping.start()
    stopping.join(0.2)
    assert stopping.is_alive()
    with pytest.raises(ZooError, match="The server stops"), work.request():
        pass
    leave.set()
    stopping.join(60)
    assert not stopping.is_alive()
    computing.join()
