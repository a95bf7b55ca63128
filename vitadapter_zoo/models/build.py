"""Every network of the catalog, with every number of every size in one place."""

from dataclasses import dataclass

from torch import nn

from vitadapter_zoo.catalog import COCO_CLASSES, Row
from vitadapter_zoo.models.adapter import ViTAdapter
from vitadapter_zoo.models.mask_rcnn import MaskRCNN
from vitadapter_zoo.models.necks import FPN, ChannelMapper
from vitadapter_zoo.models.uniperceiver import UniPerceiverAdapter
from vitadapter_zoo.models.vit import ViTBaseline

_W, _G = True, False  # windowed and global attention


@dataclass(frozen=True)
class Size:
    """The numbers of one trunk size; ``drop_path`` counts in training only."""

    dim: int
    heads: int
    windows: tuple[bool, ...]
    pretrain_grid: int
    deform_heads: int
    deform_ratio: float
    drop_path: float
    plain_drop_path: float


SIZES = {
    "T": Size(192, 3, (_W, _W, _G) * 4, 14, 6, 1.0, 0.1, 0.1),
    "S": Size(384, 6, (_W, _W, _G) * 4, 14, 6, 1.0, 0.2, 0.1),
    "B": Size(768, 12, (_W, _W, _G) * 4, 14, 12, 0.5, 0.3, 0.1),
    "L": Size(1024, 16, (_W, _W, _W, _W, _W, _G) * 4, 24, 16, 0.5, 0.4, 0.4),
}
UNIPERCEIVER_DROP_PATH = 0.2


def build_backbone(row: Row) -> nn.Module:
    """The row's backbone, with fresh weights on the current default device."""
    size = SIZES[row.size]
    trunk = (size.dim, size.heads, size.windows, size.pretrain_grid)
    if not row.has_adapter:
        return ViTBaseline(*trunk, size.plain_drop_path)
    uniperceiver = row.pretraining_name.startswith("Uni-Perceiver")
    adapter = UniPerceiverAdapter if uniperceiver else ViTAdapter
    drop_path = UNIPERCEIVER_DROP_PATH if uniperceiver else size.drop_path
    return adapter(
        *trunk, drop_path, deform_heads=size.deform_heads, deform_ratio=size.deform_ratio
    )


def build(row: Row, categories: tuple[str, ...] = COCO_CLASSES) -> MaskRCNN:
    """The row's whole detector, with fresh weights on the current default device."""
    dim = SIZES[row.size].dim
    neck = FPN(dim) if row.fpn else ChannelMapper(dim)
    return MaskRCNN(row, build_backbone(row), neck, categories)
