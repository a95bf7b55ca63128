"""Fixtures that several test modules share."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import scenes
import standins
import torch

import vitadapter_zoo
from vitadapter_zoo import MaskRCNN, get_row
from vitadapter_zoo.models import build


def pytest_configure(config: pytest.Config) -> None:
    """Make the folder of the stand-in weights; the workers of pytest-xdist inherit its name."""
    if "STANDIN_WEIGHTS" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="standins-")
        os.environ["STANDIN_WEIGHTS"] = folder.name
        config.add_cleanup(folder.cleanup)


@pytest.fixture(autouse=True)
def zoo_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a cache of its own."""
    home = tmp_path / "zoo-home"
    monkeypatch.setenv("VITADAPTER_ZOO_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def published_file() -> Callable[[str], Path]:
    """Stand-in weights of a row in a file of the published format, made once in a test run."""

    def make(row: str) -> Path:
        path = Path(os.environ["STANDIN_WEIGHTS"]) / f"{row}.pth.tar"
        if not path.exists():
            standins.whole(path, standins.checkpoint(row))
        return path

    return make


@pytest.fixture(scope="session")
def standin_model() -> Callable[[str], MaskRCNN]:
    """The detector of a row with its stand-in weights."""

    def make(name: str) -> MaskRCNN:
        with torch.device("meta"):
            model = build(get_row(name))
        model.load_state_dict(standins.state_dict(name), assign=True)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def tiny(standin_model: Callable[[str], MaskRCNN]) -> MaskRCNN:
    """The adapter-T detector with stand-in weights; tests must not change it."""
    return standin_model("adapter-t-deit-3x")


@pytest.fixture(scope="session")
def small() -> MaskRCNN:
    """A narrow detector with stand-in weights for small inputs; tests must not change it."""
    return scenes.narrow()


@pytest.fixture(scope="session")
def folder(small: MaskRCNN, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small detector saved; tests must not change it."""
    return vitadapter_zoo.save_pretrained(small, tmp_path_factory.mktemp("model"))
