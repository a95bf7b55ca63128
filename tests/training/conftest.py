"""What several tests of training share."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import shapes
import torch

from vitadapter_zoo import MaskRCNN, get_row
from vitadapter_zoo.catalog import COCO_CLASSES
from vitadapter_zoo.models import build


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The same arithmetic in every run, and no waiting for threads on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images with circles and squares in COCO's layout; tests must not change it."""
    return shapes.coco(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def nano() -> MaskRCNN:
    """A narrow detector with random weights for small images; tests must not change it."""
    torch.manual_seed(0)
    row = replace(get_row("adapter-n-emoji"), input_size=(64, 40))
    model = build(row, COCO_CLASSES)
    with torch.no_grad():
        model.get_parameter("roi_head.bbox_head.fc_cls.bias")[0] += 3  # to have some detections
    return model.eval()


@pytest.fixture
def trainable(nano: MaskRCNN) -> MaskRCNN:
    """A copy of the detector that a test may change."""
    return copy.deepcopy(nano)
