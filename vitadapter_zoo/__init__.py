"""vitadapter-zoo: ViT-Adapter + Mask R-CNN checkpoints on current PyTorch.

Importing the package does not import torch. The functions, classes and subpackages that need torch
are imported on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from vitadapter_zoo import _moved
from vitadapter_zoo._version import __version__
from vitadapter_zoo.catalog import Row, get_row, list_models
from vitadapter_zoo.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    DatasetError,
    DownloadError,
    ImageError,
    UnknownModelError,
    UnsafeCheckpointError,
    ZooError,
)
from vitadapter_zoo.timm_detector import TimmDetector

if TYPE_CHECKING:
    from vitadapter_zoo import backends, evaluation, models, ops, reports, training, web
    from vitadapter_zoo.backbones import backbone, register_timm
    from vitadapter_zoo.detections import Detections
    from vitadapter_zoo.evaluation.verdict import Verification
    from vitadapter_zoo.evaluation.verify import verify
    from vitadapter_zoo.exporting.export import export
    from vitadapter_zoo.loader import load
    from vitadapter_zoo.models import DINOv3Adapter, MaskRCNN, ViTAdapter
    from vitadapter_zoo.publishing.pretrained import push_to_hub, save_pretrained
    from vitadapter_zoo.training.run import train

__all__ = [
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "DINOv3Adapter",
    "DatasetError",
    "Detections",
    "DownloadError",
    "ImageError",
    "MaskRCNN",
    "Row",
    "TimmDetector",
    "UnknownModelError",
    "UnsafeCheckpointError",
    "Verification",
    "ViTAdapter",
    "ZooError",
    "__version__",
    "backbone",
    "backends",
    "evaluation",
    "export",
    "get_row",
    "list_models",
    "load",
    "models",
    "ops",
    "push_to_hub",
    "register_timm",
    "reports",
    "save_pretrained",
    "train",
    "training",
    "verify",
    "web",
]

# Public names by the module that defines them, and public subpackages.
_LAZY = {
    "DINOv3Adapter": "models",
    "Detections": "detections",
    "MaskRCNN": "models",
    "Verification": "evaluation.verdict",
    "ViTAdapter": "models",
    "backbone": "backbones",
    "load": "loader",
    "push_to_hub": "publishing.pretrained",
    "export": "exporting.export",
    "register_timm": "backbones",
    "save_pretrained": "publishing.pretrained",
    "train": "training.run",
    "verify": "evaluation.verify",
}
_SUBPACKAGES = ("backends", "evaluation", "models", "ops", "reports", "training", "web")

_moved.install()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _moved.MOVED:
        return _moved.moved(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
