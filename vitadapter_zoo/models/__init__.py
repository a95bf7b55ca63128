"""The detectors' networks: ViT, ViT-Adapter and Uni-Perceiver backbones with Mask R-CNN."""

from vitadapter_zoo.models.build import build
from vitadapter_zoo.models.mask_rcnn import MaskRCNN

__all__ = ["MaskRCNN", "build"]
