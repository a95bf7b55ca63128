"""The models in mmdet 2.x: mmdet detectors with this package's backbones.

If mmdet is installed, importing this package registers ``ViTAdapter``, ``ViTBaseline``,
``UniPerceiverAdapter``, ``ChannelMapperWithPooling`` and ``LayerDecayOptimizerConstructor`` in
mmdet and mmcv under the original project's names, so that its configuration files work with
``custom_imports = dict(imports=["vitadapter_zoo.backends.mmdet"])``.

``modules`` does not need mmdet, and neither does ``vitadapter_zoo.backends.mmdet_config``. The
functions raise a BackendError if mmdet is missing; importing this package raises one if mmdet is
installed but broken.
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
