"""vitadapter-zoo: ViT-Adapter + Mask R-CNN checkpoints on current PyTorch.

Importing the package does not import torch: what needs it is imported when it is first used.
"""

from typing import TYPE_CHECKING, Any

from vitadapter_zoo.catalog import Row, get_row, list_models
from vitadapter_zoo.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    DownloadError,
    ImageError,
    UnknownModelError,
    UnsafeCheckpointError,
    ZooError,
)

if TYPE_CHECKING:
    from vitadapter_zoo.detections import Detections
    from vitadapter_zoo.loader import load
    from vitadapter_zoo.models import MaskRCNN
    from vitadapter_zoo.pretrained import push_to_hub, save_pretrained

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "Detections",
    "DownloadError",
    "ImageError",
    "MaskRCNN",
    "Row",
    "UnknownModelError",
    "UnsafeCheckpointError",
    "ZooError",
    "get_row",
    "list_models",
    "load",
    "push_to_hub",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    if name == "load":
        from vitadapter_zoo.loader import load

        return load
    if name in ("save_pretrained", "push_to_hub"):
        from vitadapter_zoo import pretrained

        return getattr(pretrained, name)
    if name == "MaskRCNN":
        from vitadapter_zoo.models import MaskRCNN

        return MaskRCNN
    if name == "Detections":
        from vitadapter_zoo.detections import Detections

        return Detections
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
