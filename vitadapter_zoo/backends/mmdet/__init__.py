"""The checkpoints inside mmdet 2.x: real mmdet detectors around this package's backbones.

Where mmdet is installed, importing this package puts ``ViTAdapter``, ``ViTBaseline``,
``UniPerceiverAdapter``, ``ChannelMapperWithPooling`` and ``LayerDecayOptimizerConstructor`` into
the registries of mmdet and mmcv, under the original project's names, so that its configuration
files work with ``custom_imports = dict(imports=["vitadapter_zoo.backends.mmdet"])``.

``config`` and ``modules`` need no mmdet. The functions raise a BackendError where it is missing,
and importing this package raises one where it is installed and broken.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitadapter_zoo.backends.mmdet.detector import detect, from_native, stages

__all__ = ["detect", "from_native", "stages"]

if importlib.util.find_spec("mmdet") is not None:
    importlib.import_module("vitadapter_zoo.backends.mmdet.detector")


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("vitadapter_zoo.backends.mmdet.detector"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
