"""Detectors in mmdet with stand-in weights."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pictures
import pytest
import torch
from torch import nn

from vitadapter_zoo import MaskRCNN
from vitadapter_zoo.backends import mmdet


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The five pictures, by name."""
    return pictures.make(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def both(standin_model: Callable[[str], MaskRCNN]) -> Callable[[str], tuple[MaskRCNN, nn.Module]]:
    """A row's detector here and in mmdet, with the same stand-in weights."""

    def make(name: str) -> tuple[MaskRCNN, nn.Module]:
        native = standin_model(name)
        return native, mmdet.from_native(native)

    return make


@pytest.fixture(scope="session")
def plain(
    both: Callable[[str], tuple[MaskRCNN, nn.Module]],
) -> tuple[MaskRCNN, nn.Module]:
    """The ViT-T detectors; tests must not change them."""
    return both("vit-t-deit-3x")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Fresh weights and mmdet's augmentation are the same in every run."""
    torch.manual_seed(0)
    np.random.seed(0)  # mmdet draws from both
