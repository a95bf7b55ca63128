"""The published results: one row per checkpoint, as plain data; and the detector made here.

The figures of ``ROWS`` are the original tables' (ViT-Adapter, arXiv:2205.08534, detection README);
they are never computed here, except the gains over the plain ViT, which are never stored. Those of
``DINOV2`` are of a table that the authors published later (configs/mask_rcnn/dinov2/README). Those
of ``MADE_HERE`` were measured by this package after a training with it.
"""

import difflib
import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitadapter_zoo.class_names import COCO_CATEGORY_IDS as COCO_CATEGORY_IDS
from vitadapter_zoo.class_names import COCO_CLASSES as COCO_CLASSES
from vitadapter_zoo.class_names import EMOJI_CLASSES as EMOJI_CLASSES
from vitadapter_zoo.errors import UnknownModelError
from vitadapter_zoo.timm_detector import TimmDetector

PAPER = "https://arxiv.org/abs/2205.08534"
LICENSE = "Apache-2.0"
UNKNOWN_LICENSE = "unknown"
INPUT_SIZE = (1333, 800)

PACKAGED = "package:"  # begins the address of a file within this package
PACKAGE = Path(__file__).parent

Triple = tuple[float, float, float]
IMAGENET_MEAN: Triple = (123.675, 116.28, 103.53)
IMAGENET_STD: Triple = (58.395, 57.12, 57.375)
HALF: Triple = (127.5, 127.5, 127.5)

_RELEASES = "https://github.com/czczup/ViT-Adapter/releases/download"
_HUB = "https://huggingface.co/czczup/ViT-Adapter"
_DEIT = "https://dl.fbaipublicfiles.com/deit"
_AUGREG = "https://storage.googleapis.com/vit_models/augreg"
_DINOV2 = "https://dl.fbaipublicfiles.com/dinov2"

DEIT_T = ("DeiT-T", f"{_DEIT}/deit_tiny_patch16_224-a1311bcf.pth")
DEIT_S = ("DeiT-S", f"{_DEIT}/deit_small_patch16_224-cd65a155.pth")
DEIT_B = ("DeiT-B", f"{_DEIT}/deit_base_patch16_224-b5f2ef4d.pth")
UNIPERCEIVER_B = (
    "Uni-Perceiver-B",
    f"{_RELEASES}/v0.3.1/uni-perceiver-base-L12-H768-224size-torch-pretrained_converted.pth",
)
AUGREG_L = (
    "AugReg-L",
    f"{_AUGREG}/L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1"
    "--imagenet2012-steps_20k-lr_0.01-res_384.npz",
)
DINOV2_S = ("DINOv2-S", f"{_DINOV2}/dinov2_vits14/dinov2_vits14_pretrain.pth")
DINOV2_B = ("DINOv2-B", f"{_DINOV2}/dinov2_vitb14/dinov2_vitb14_pretrain.pth")
DINOV2_L = ("DINOv2-L", f"{_DINOV2}/dinov2_vitl14/dinov2_vitl14_pretrain.pth")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published checkpoint, with everything that the published tables say about it.

    Attributes:
        name: the load name, as in ``vitadapter_zoo.load(name)``.
        backbone: as printed, ``ViT-Adapter-T`` for instance.
        size: T, S, B or L; N for the detector made here.
        pretraining: name and URL of the weights that training started from.
        schedule: ``1x`` or ``3x+MS`` (36 epochs, multi-scale).
        fpn: whether the neck is an FPN (else a channel mapper).
        box_ap: published box AP on COCO val2017, 0..100.
        mask_ap: published mask AP on COCO val2017, 0..100.
        parameters: published number of parameters in millions, rounded as printed.
        config: the original config file's name.
        checkpoint_url: where the weights are published.
        log_url: the training log; None if none is published.
        input_size: (longest, shortest) side of the resized image in pixels.
        mean: RGB mean of the input normalisation, 0..255.
        std: RGB standard deviation of the input normalisation, 0..255.
        license: SPDX identifier of the repository that publishes the weights.
        paper: URL.
        tables: the tables that print the row: 1 (results), 2 (without FPN), or both; 3 holds what
            was made here, 4 the authors' later results with DINOv2's pretraining.
        classes: names of the classes that the weights know, in the order of the outputs.
        data: data set that the figures were measured on, as a folder within this package in COCO's
            layout; None for COCO's val2017, which is not in it.
        sha256: of the published file; None if unknown.
        file_bytes: size of the published file; None if unknown.
        notes: what a user of the row should know.
        network: of a detector around a timm model, which is in no table; None for the others.
    """

    name: str
    backbone: str
    size: str
    pretraining: tuple[str, str]
    schedule: str
    fpn: bool = True
    box_ap: float
    mask_ap: float
    parameters: int
    config: str
    checkpoint_url: str
    log_url: str | None = None
    input_size: tuple[int, int] = INPUT_SIZE
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    license: str = LICENSE
    paper: str = PAPER
    tables: tuple[int, ...] = (1,)
    sha256: str | None = None
    file_bytes: int | None = None
    notes: str = ""
    classes: tuple[str, ...] = COCO_CLASSES
    data: str | None = None
    network: TimmDetector | None = None

    @property
    def pretraining_name(self) -> str:
        """Name of the pretraining, ``DeiT-T`` for instance."""
        return self.pretraining[0]

    @property
    def pretraining_url(self) -> str:
        """URL of the pretrained weights."""
        return self.pretraining[1]

    @property
    def from_dinov2(self) -> bool:
        """Whether training started from DINOv2's weights."""
        return self.pretraining_name.startswith("DINOv2")

    @property
    def made_here(self) -> bool:
        """Whether the weights were trained for this package and are included in it."""
        return self.checkpoint_url.startswith(PACKAGED)

    @property
    def data_files(self) -> tuple[Path, Path] | None:
        """Annotation file and image folder of ``data``; None if they are not in this package."""
        if self.data is None:
            return None
        folder = PACKAGE / self.data
        return folder / "annotations" / "instances_val.json", folder / "val"

    @property
    def has_adapter(self) -> bool:
        """Whether the backbone is a ViT-Adapter, rather than a plain ViT."""
        return self.backbone.startswith("ViT-Adapter")

    @property
    def plain(self) -> "Row | None":
        """The plain ViT of the same size, pretraining and schedule; None for plain rows."""
        if not self.has_adapter:
            return None
        for row in ROWS:
            same = (row.pretraining, row.schedule) == (self.pretraining, self.schedule)
            if same and not row.has_adapter:
                return row
        return None

    @property
    def box_gain(self) -> float | None:
        """Box AP minus the plain ViT's, in points; None if the catalog has no such row."""
        return round(self.box_ap - self.plain.box_ap, 1) if self.plain else None

    @property
    def mask_gain(self) -> float | None:
        """Mask AP minus the plain ViT's, in points; None if the catalog has no such row."""
        return round(self.mask_ap - self.plain.mask_ap, 1) if self.plain else None


ROWS: tuple[Row, ...] = (
    Row(
        name="adapter-t-deit-1x", backbone="ViT-Adapter-T", size="T", pretraining=DEIT_T,
        schedule="1x", box_ap=41.1, mask_ap=37.5, parameters=28,
        config="mask_rcnn_deit_adapter_tiny_fpn_1x_coco.py",
        checkpoint_url=f"{_HUB}/resolve/main/mask_rcnn_deit_adapter_tiny_fpn_1x_coco.pth",
        log_url=f"{_HUB}/resolve/main/mask_rcnn_deit_adapter_tiny_fpn_1x_coco.log",
        sha256="09b2e00ce57775522de77b2399cab824ba4d4768ca5925037f5bd2376d5d3553",
        notes="Trained without layer scale: absent gamma1/gamma2 are filled with ones, "
        "which computes the same.",
    ),
    Row(
        name="vit-t-deit-3x", backbone="ViT-T", size="T", pretraining=DEIT_T,
        schedule="3x+MS", box_ap=40.2, mask_ap=37.0, parameters=26,
        config="mask_rcnn_deit_tiny_fpn_3x_coco.py",
        checkpoint_url=f"{_RELEASES}/v0.3.1/mask_rcnn_deit_tiny_fpn_3x_coco.pth.tar",
    ),
    Row(
        name="adapter-t-deit-3x", backbone="ViT-Adapter-T", size="T", pretraining=DEIT_T,
        schedule="3x+MS", box_ap=46.0, mask_ap=41.0, parameters=28,
        config="mask_rcnn_deit_adapter_tiny_fpn_3x_coco.py",
        checkpoint_url=f"{_RELEASES}/v0.1.2/mask_rcnn_deit_adapter_tiny_fpn_3x_coco.pth.tar",
    ),
    Row(
        name="vit-s-deit-3x", backbone="ViT-S", size="S", pretraining=DEIT_S,
        schedule="3x+MS", box_ap=44.0, mask_ap=39.9, parameters=42,
        config="mask_rcnn_deit_small_fpn_3x_coco.py",
        checkpoint_url=f"{_RELEASES}/v0.3.1/mask_rcnn_deit_small_fpn_3x_coco.pth.tar",
        notes="Published as 42M parameters; the network has 43.75M.",
    ),
    Row(
        name="adapter-s-deit-3x", backbone="ViT-Adapter-S", size="S", pretraining=DEIT_S,
        schedule="3x+MS", box_ap=48.2, mask_ap=42.8, parameters=48, tables=(1, 2),
        config="mask_rcnn_deit_adapter_small_fpn_3x_coco.py",
        checkpoint_url=f"{_RELEASES}/v0.1.2/mask_rcnn_deit_adapter_small_fpn_3x_coco.pth.tar",
    ),
    Row(
        name="vit-b-deit-3x", backbone="ViT-B", size="B", pretraining=DEIT_B,
        schedule="3x+MS", box_ap=45.8, mask_ap=41.3, parameters=114,
        config="mask_rcnn_deit_base_fpn_3x_coco.py",
        checkpoint_url=f"{_RELEASES}/v0.3.1/mask_rcnn_deit_base_fpn_3x_coco.pth.tar",
    ),
    Row(
        name="adapter-b-deit-3x", backbone="ViT-Adapter-B", size="B", pretraining=DEIT_B,
        schedule="3x+MS", box_ap=49.6, mask_ap=43.6, parameters=120,
        config="mask_rcnn_deit_adapter_base_fpn_3x_coco.py",
        checkpoint_url=f"{_RELEASES}/v0.1.6/mask_rcnn_deit_adapter_base_fpn_3x_coco.pth.tar",
    ),
    Row(
        name="adapter-b-uniperceiver-3x", backbone="ViT-Adapter-B", size="B",
        pretraining=UNIPERCEIVER_B, schedule="3x+MS", box_ap=51.2, mask_ap=45.3, parameters=120,
        config="mask_rcnn_uniperceiver_adapter_base_fpn_3x_coco.py",
        checkpoint_url=f"{_RELEASES}/v0.3.1/mask_rcnn_uniperceiver_adapter_base_fpn_3x_coco.pth",
        log_url=f"{_HUB}/raw/main/mask_rcnn_uniperceiver_adapter_base_fpn_3x_coco.log",
        notes="An older file (release v0.1.1, .pth.tar, 50.7 / 44.9 AP) is still in circulation.",
    ),
    Row(
        name="vit-l-augreg-3x", backbone="ViT-L", size="L", pretraining=AUGREG_L,
        schedule="3x+MS", box_ap=48.3, mask_ap=43.3, parameters=337, mean=HALF, std=HALF,
        config="mask_rcnn_augreg_large_fpn_3x_coco.py",
        checkpoint_url=f"{_RELEASES}/v0.3.1/mask_rcnn_augreg_large_fpn_3x_coco.pth.tar",
    ),
    Row(
        name="adapter-l-augreg-3x", backbone="ViT-Adapter-L", size="L", pretraining=AUGREG_L,
        schedule="3x+MS", box_ap=52.1, mask_ap=46.0, parameters=348, mean=HALF, std=HALF,
        config="mask_rcnn_augreg_adapter_large_fpn_3x_coco.py",
        checkpoint_url=f"{_RELEASES}/v0.3.1/mask_rcnn_augreg_adapter_large_fpn_3x_coco.pth",
        log_url=f"{_HUB}/raw/main/mask_rcnn_augreg_adapter_large_fpn_3x_coco.log",
        notes="An older file (release v0.1.2, .pth.tar, 50.9 / 44.8 AP) is still in circulation; "
        "it has BatchNorm in neck and heads and does not fit.",
    ),
    Row(
        name="adapter-s-deit-3x-nofpn", backbone="ViT-Adapter-S", size="S", pretraining=DEIT_S,
        schedule="3x+MS", fpn=False, box_ap=48.2, mask_ap=42.7, parameters=45, tables=(2,),
        config="mask_rcnn_deit_adapter_small_3x_coco.py",
        checkpoint_url=f"{_RELEASES}/v0.1.6/mask_rcnn_deit_adapter_small_3x_coco.pth.tar",
    ),
)  # fmt: skip

DINOV2: tuple[Row, ...] = (
    Row(
        name="adapter-s-dinov2-3x", backbone="ViT-Adapter-S", size="S", pretraining=DINOV2_S,
        schedule="3x+MS", box_ap=51.5, mask_ap=45.6, parameters=48, tables=(4,),
        config="mask_rcnn_dinov2_adapter_small_fpn_3x_coco.py",
        checkpoint_url=f"{_HUB}/resolve/main/mask_rcnn_dinov2_adapter_small_fpn_3x_coco.pth",
        log_url=f"{_HUB}/resolve/main/mask_rcnn_dinov2_adapter_small_fpn_3x_coco.log",
        sha256="d37fd251d9aad6cb9f8efa06c5de4dab5ac88b03ec49536bc794730458e92343",
        file_bytes=193171513,
        notes="DINOv2's 14x14 patch embedding was resized to 16x16 before the training.",
    ),
    Row(
        name="adapter-b-dinov2-3x", backbone="ViT-Adapter-B", size="B", pretraining=DINOV2_B,
        schedule="3x+MS", box_ap=54.1, mask_ap=47.8, parameters=120, tables=(4,),
        config="mask_rcnn_dinov2_adapter_base_fpn_3x_coco.py",
        checkpoint_url=f"{_HUB}/resolve/main/mask_rcnn_dinov2_adapter_base_fpn_3x_coco.pth",
        log_url=f"{_HUB}/resolve/main/mask_rcnn_dinov2_adapter_base_fpn_3x_coco.log",
        sha256="ff145f8441e91b97a09f23a977e27ef7cbfe170b9433ae509716a076fc52b282",
        file_bytes=484524793,
        notes="DINOv2's 14x14 patch embedding was resized to 16x16 before the training.",
    ),
    Row(
        name="adapter-l-dinov2-3x", backbone="ViT-Adapter-L", size="L", pretraining=DINOV2_L,
        schedule="3x+MS", box_ap=55.3, mask_ap=49.0, parameters=348, tables=(4,),
        config="mask_rcnn_dinov2_adapter_large_fpn_3x_coco.py",
        checkpoint_url=f"{_HUB}/resolve/main/mask_rcnn_dinov2_adapter_large_fpn_3x_coco.pth",
        log_url=f"{_HUB}/resolve/main/mask_rcnn_dinov2_adapter_large_fpn_3x_coco.log",
        sha256="53f760346a611b706a169569b3e4c5bf64446adbb928d3a6d00b342e2fb48ac4",
        file_bytes=1395190889,
        notes="DINOv2's 14x14 patch embedding was resized to 16x16 before the training. Its "
        "configuration trains with mean = std = 127.5 and evaluates with ImageNet's mean and "
        "deviation; the published figures are of the evaluation, so the row has the latter.",
    ),
)  # fmt: skip

PUBLISHED: tuple[Row, ...] = (*ROWS, *DINOV2)  # trained and measured by the paper's authors

MADE_HERE: tuple[Row, ...] = (
    Row(
        name="adapter-n-emoji", backbone="ViT-Adapter-N", size="N",
        pretraining=("from scratch", ""), schedule="emoji", box_ap=68.5, mask_ap=65.4, parameters=3,
        config="scripts/train_demo.py",
        checkpoint_url=f"{PACKAGED}data/emoji/adapter-n-emoji.safetensors",
        input_size=(320, 256), tables=(3,), classes=EMOJI_CLASSES, data="data/emoji",
        notes="A small detector for demonstrations and tests: 18 of COCO's classes as drawings "
        "(Noto Color Emoji) on photos and textures. Its figures are of 200 such images, not of "
        "COCO.",
    ),
)  # fmt: skip


def list_models(
    filter: str | Sequence[str] | None = None,  # noqa: A002  timm's name for the same argument
    *,
    exclude_filters: str | Sequence[str] = (),
    backbone: str | None = None,
    size: str | None = None,
    pretraining: str | None = None,
    schedule: str | None = None,
    fpn: bool | None = None,
    table: int | None = None,
) -> list[str]:
    """List load names in the order of the tables: all, or those that meet every criterion.

    DINOv2's rows follow the two tables of the paper; what was made here comes last.

    Args:
        filter: shell pattern on the name, ``"adapter-*"`` or ``"*-l-*"``; of a list of patterns
            one has to fit.
        exclude_filters: patterns of names that are left out, as in timm.
        backbone: ``"ViT-Adapter-S"``, as printed in the tables; case does not matter.
        size: ``"T"``, ``"S"``, ``"B"``, ``"L"`` or ``"N"``; case does not matter.
        pretraining: ``"DeiT-T"``, or its family ``"DeiT"``; case does not matter.
        schedule: ``"1x"`` or ``"3x+MS"``; case does not matter.
        fpn: with or without an FPN.
        table: 1 (results), 2 (without FPN), 3 (made here) or 4 (DINOv2).
    """
    wanted_names = _patterns(filter)
    unwanted_names = _patterns(exclude_filters)

    def same(wanted: str | None, value: str) -> bool:
        return wanted is None or wanted.casefold() == value.casefold()

    return [
        row.name
        for row in (*PUBLISHED, *MADE_HERE)
        if (filter is None or _fits(row.name, wanted_names))
        and not _fits(row.name, unwanted_names)
        and same(backbone, row.backbone)
        and same(size, row.size)
        and (
            same(pretraining, row.pretraining_name)
            or same(pretraining, row.pretraining_name.rpartition("-")[0])
        )
        and same(schedule, row.schedule)
        and (fpn is None or fpn == row.fpn)
        and (table is None or table in row.tables)
    ]


def timm_row(
    network: TimmDetector,
    mean: Triple = IMAGENET_MEAN,
    std: Triple = IMAGENET_STD,
    input_size: tuple[int, int] = INPUT_SIZE,
) -> Row:
    """The row of a detector around a timm model. It has no published figures, they are NaN.

    Args:
        network: how the detector is built.
        mean: RGB mean of the input normalisation, 0..255.
        std: RGB standard deviation of the input normalisation, 0..255.
        input_size: (longest, shortest) side of the resized image in pixels.
    """
    return Row(
        name=network.name, backbone=network.described, size="",
        pretraining=(network.weights or "from scratch", ""), schedule="3x+MS",
        box_ap=math.nan, mask_ap=math.nan, parameters=0, config="", checkpoint_url="",
        input_size=input_size, mean=mean, std=std, license=network.license or UNKNOWN_LICENSE,
        tables=(), classes=(), network=network,
    )  # fmt: skip


def _patterns(given: str | Sequence[str] | None) -> Sequence[str]:
    return [given] if isinstance(given, str) else given or ()


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def get_row(name: str) -> Row:
    """Return the row of a load name.

    Raises:
        UnknownModelError: no such row; the message suggests similar names.
    """
    rows = {row.name: row for row in (*PUBLISHED, *MADE_HERE)}
    if name in rows:
        return rows[name]
    near = difflib.get_close_matches(name.casefold(), rows, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise UnknownModelError(
        f"unknown model {name!r}: {hint}`vitadapter-zoo list` shows all {len(rows)}"
    )
