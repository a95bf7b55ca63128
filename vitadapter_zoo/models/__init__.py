"""The networks, in plain PyTorch."""

from vitadapter_zoo.models.build import build
from vitadapter_zoo.models.mask_rcnn import MaskRCNN

__all__ = ["MaskRCNN", "build"]
