"""Building the network of a catalog row; the hyperparameters of every network size are here."""

from dataclasses import dataclass

from torch import nn

from vitadapter_zoo.catalog import Row
from vitadapter_zoo.models.boxes import ANCHOR_SCALE, FINEST_SCALE
from vitadapter_zoo.models.heads import BOX_WIDTH, MASK_CONVS, REGIONS, RoIHead, RPNHead
from vitadapter_zoo.models.mask_rcnn import MaskRCNN
from vitadapter_zoo.models.necks import FPN, WIDTH, ChannelMapper
from vitadapter_zoo.models.precision import float32_by_default
from vitadapter_zoo.models.spatial_prior import STEM_WIDTH
from vitadapter_zoo.models.uniperceiver import UniPerceiverAdapter
from vitadapter_zoo.models.vit import ViTBaseline
from vitadapter_zoo.models.vit_adapter import ViTAdapter

_W, _G = True, False  # windowed and global attention


@dataclass(frozen=True)
class Size:
    """The hyperparameters of one network size; the defaults are those of all published networks.

    Attributes:
        dim: width of the trunk's tokens.
        heads: heads of the trunk's attention.
        windows: one flag per block, True for windowed, False for global attention.
        pretrain_grid: side of the grid of position embeddings; DINOv2's is ``DINOV2_GRID``.
        deform_heads: heads of the deformable attention.
        deform_ratio: width of the deformable attention's values relative to ``dim``.
        drop_path: largest stochastic-depth rate of the adapter backbone, in training only.
        plain_drop_path: largest stochastic-depth rate of the plain ViT backbone.
        stem_width: width of the spatial prior's stem; its deeper maps are two and four times as
            wide.
        neck_width: channels of the neck's maps, the proposal head and the mask head.
        box_width: width of the box head's hidden layers.
        mask_convs: number of 3x3 convolutions in the mask head.
        anchor_scale: side of the square anchor in strides.
        regions: proposals per image that the box and mask losses use.
        finest_scale: boxes below twice this size in pixels are pooled at stride 4.
    """

    dim: int
    heads: int
    windows: tuple[bool, ...]
    pretrain_grid: int
    deform_heads: int
    deform_ratio: float
    drop_path: float
    plain_drop_path: float
    stem_width: int = STEM_WIDTH
    neck_width: int = WIDTH
    box_width: int = BOX_WIDTH
    mask_convs: int = MASK_CONVS
    anchor_scale: int = ANCHOR_SCALE
    regions: int = REGIONS
    finest_scale: int = FINEST_SCALE


SIZES = {
    # This project's own network. Its images and objects are small, so anchors start at 16 pixels.
    "N": Size(
        96, 3, (_W, _G) * 4, 16, 6, 1.0, 0.0, 0.0,
        stem_width=32, neck_width=80, box_width=168, mask_convs=4, anchor_scale=4, regions=128,
    ),
    "T": Size(192, 3, (_W, _W, _G) * 4, 14, 6, 1.0, 0.1, 0.1),
    "S": Size(384, 6, (_W, _W, _G) * 4, 14, 6, 1.0, 0.2, 0.1),
    "B": Size(768, 12, (_W, _W, _G) * 4, 14, 12, 0.5, 0.3, 0.1),
    "L": Size(1024, 16, (_W, _W, _W, _W, _W, _G) * 4, 24, 16, 0.5, 0.4, 0.4),
}  # fmt: skip
UNIPERCEIVER_DROP_PATH = 0.2
DINOV2_GRID = 37  # pretrained at 518 pixels with patches of 14 (arXiv:2304.07193, section 4)


def pretrain_grid(row: Row) -> int:
    """Return the side of the row's grid of position embeddings."""
    return DINOV2_GRID if row.from_dinov2 else SIZES[row.size].pretrain_grid


def build_backbone(row: Row) -> nn.Module:
    """Build the row's backbone, with newly initialised weights on the current default device."""
    size = SIZES[row.size]
    trunk = (size.dim, size.heads, size.windows, pretrain_grid(row))
    if not row.has_adapter:
        return ViTBaseline(*trunk, size.plain_drop_path)
    uniperceiver = row.pretraining_name.startswith("Uni-Perceiver")
    adapter = UniPerceiverAdapter if uniperceiver else ViTAdapter
    drop_path = UNIPERCEIVER_DROP_PATH if uniperceiver else size.drop_path
    return adapter(
        *trunk,
        drop_path,
        deform_heads=size.deform_heads,
        deform_ratio=size.deform_ratio,
        stem_width=size.stem_width,
    )


@float32_by_default()
def build(row: Row, categories: tuple[str, ...] | None = None) -> MaskRCNN:
    """Build the row's whole detector, with newly initialised float32 weights on the default device.

    ``categories`` are the names of the classes. The default is the classes of the row's weights.
    """
    size = SIZES[row.size]
    categories = row.classes if categories is None else categories
    neck = (FPN if row.fpn else ChannelMapper)(size.dim, size.neck_width)
    return MaskRCNN(
        row,
        build_backbone(row),
        neck,
        categories,
        rpn_head=RPNHead(size.neck_width, size.anchor_scale),
        roi_head=RoIHead(
            len(categories),
            size.neck_width,
            size.box_width,
            size.mask_convs,
            size.regions,
            size.finest_scale,
        ),
    )
