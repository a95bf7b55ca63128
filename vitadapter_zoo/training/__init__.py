"""Training: the original's losses.

Importing this package does not import torch: it imports a name's module on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitadapter_zoo.models.losses import losses

__all__ = ["losses"]

# The losses are in models/ because `model(images, targets)` returns them.
_LAZY = {"losses": "vitadapter_zoo.models.losses"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
