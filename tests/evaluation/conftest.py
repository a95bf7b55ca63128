"""A trained detector, a few images in COCO's layout, and one verification of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scenes
from verification import PICTURES, annotation_file

import vitadapter_zoo
from vitadapter_zoo import (
    MaskRCNN,
    Verification,
)


@pytest.fixture(scope="session")
def detector() -> MaskRCNN:
    """The trained detector of the package; tests must not change it."""
    return vitadapter_zoo.load("adapter-n-emoji")


@pytest.fixture(scope="session")
def saved(detector: MaskRCNN, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The detector saved; tests must not change it."""
    return vitadapter_zoo.save_pretrained(detector, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the package's validation images in COCO's layout; tests that change it copy it."""
    return scenes.validation_images(tmp_path_factory.mktemp("coco"), PICTURES)


@pytest.fixture(scope="session")
def undisturbed(
    detector: MaskRCNN, coco: Path, tmp_path_factory: pytest.TempPathFactory
) -> Verification:
    return vitadapter_zoo.verify(detector, coco, run=tmp_path_factory.mktemp("run"))


@pytest.fixture
def changed(coco: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], None]], Path]:
    """A copy of the data set with its annotations changed."""

    def make(change: Callable[[dict[str, Any]], None]) -> Path:
        root = tmp_path / "changed"
        shutil.copytree(coco, root)
        content = json.loads(annotation_file(root).read_text())
        change(content)
        annotation_file(root).write_text(json.dumps(content))
        return root

    return make
