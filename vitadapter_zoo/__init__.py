"""vitadapter-zoo: ViT-Adapter + Mask R-CNN checkpoints on current PyTorch.

Importing the package does not import torch: what needs it is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from vitadapter_zoo._version import __version__ as __version__
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

if TYPE_CHECKING:
    from vitadapter_zoo.detections import Detections
    from vitadapter_zoo.evaluation.verdict import Verification
    from vitadapter_zoo.evaluation.verify import verify
    from vitadapter_zoo.loader import load
    from vitadapter_zoo.models import MaskRCNN
    from vitadapter_zoo.publishing.pretrained import push_to_hub, save_pretrained

__all__ = [
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "DatasetError",
    "Detections",
    "DownloadError",
    "ImageError",
    "MaskRCNN",
    "Row",
    "UnknownModelError",
    "UnsafeCheckpointError",
    "Verification",
    "ZooError",
    "get_row",
    "list_models",
    "load",
    "push_to_hub",
    "save_pretrained",
    "verify",
]


# Where the names are that need torch.
_LAZY = {
    "Detections": "vitadapter_zoo.detections",
    "MaskRCNN": "vitadapter_zoo.models",
    "Verification": "vitadapter_zoo.evaluation.verdict",
    "load": "vitadapter_zoo.loader",
    "push_to_hub": "vitadapter_zoo.publishing.pretrained",
    "save_pretrained": "vitadapter_zoo.publishing.pretrained",
    "verify": "vitadapter_zoo.evaluation.verify",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
