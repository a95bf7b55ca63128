"""vitadapter-zoo: ViT-Adapter + Mask R-CNN checkpoints on current PyTorch."""

__version__ = "0.1.0"
