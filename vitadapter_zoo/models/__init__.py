"""The networks: ViT, ViT-Adapter and Uni-Perceiver backbones, adapters around timm's models."""

from vitadapter_zoo.models.build import build
from vitadapter_zoo.models.dinov3 import DINOv3Adapter
from vitadapter_zoo.models.mask_rcnn import MaskRCNN
from vitadapter_zoo.models.vit_adapter import TimmViTAdapter, ViTAdapter

__all__ = ["DINOv3Adapter", "MaskRCNN", "TimmViTAdapter", "ViTAdapter", "build"]
