"""The mmdet 2.x configuration of a row; it needs neither mmdet nor mmcv, and imports neither.

The training recipes are those of the original configuration files (``Row.config``), for 8 GPUs with
2 images each. Mixed precision, which some of the files enable, is left out because it needs a GPU;
``fp16 = dict(loss_scale=dict(init_scale=512))`` enables it.
"""

from pprint import pformat
from typing import Any

from vitadapter_zoo.catalog import Row
from vitadapter_zoo.detections.masks import MASK_THRESHOLD
from vitadapter_zoo.models import heads, layer_decay
from vitadapter_zoo.models.adapter import CONV_FFN_RATIO, POINTS
from vitadapter_zoo.models.boxes import ANCHOR_RATIOS, ROI_STRIDES
from vitadapter_zoo.models.build import SIZES, UNIPERCEIVER_DROP_PATH, Size, pretrain_grid
from vitadapter_zoo.models.mask_rcnn import SCORE_THRESHOLD
from vitadapter_zoo.models.vit import PATCH, WINDOW

MODULE = "vitadapter_zoo.backends.mmdet"

# AugReg publishes .npz; this is the original project's conversion of it.
AUGREG_L_PTH = (
    "https://github.com/czczup/ViT-Adapter/releases/download/v0.1.6/"
    "L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1"
    "--imagenet2012-steps_20k-lr_0.01-res_384.pth"
)
# Augmentation as in DETR and Sparse R-CNN: shorter sides of the resized image, before and after a
# random crop.
SHORT_SIDES = tuple(range(480, 801, 32))
SHORT_SIDES_BEFORE_CROP = (400, 500, 600)

Config = dict[str, Any]


def mmdet_config(row: Row, categories: tuple[str, ...] | None = None) -> Config:
    """The configuration with which mmdet's tools test and train a row, for ``mmcv.Config(...)``.

    Args:
        row: of the catalog.
        categories: names of the classes, in the order of the outputs; the row's by default.

    Returns:
        The top-level settings of a configuration file, in the usual order. The data set is
        expected in ``data/coco/``.
    """
    categories = row.classes if categories is None else categories
    return {
        "custom_imports": {"imports": [MODULE], "allow_failed_imports": False},
        "model": _model(row, len(categories)),
        "data": _data(row, categories),
        "evaluation": {"metric": ["bbox", "segm"], "save_best": "auto"},
        **_schedule(row),
        "checkpoint_config": {"interval": 1, "max_keep_ckpts": 3, "save_last": True},
        "log_config": {"interval": 50, "hooks": [{"type": "TextLoggerHook"}]},
        "custom_hooks": [{"type": "NumClassCheckHook"}],
        "dist_params": {"backend": "nccl"},
        "log_level": "INFO",
        "load_from": None,
        "resume_from": None,
        "workflow": [("train", 1)],
    }


def as_python(config: Config) -> str:
    """The text of a configuration file, which ``mmcv.Config.fromfile`` reads."""
    settings = [
        f"{name} = {pformat(value, width=96, sort_dicts=False)}" for name, value in config.items()
    ]
    return "\n".join(settings) + "\n"


def _model(row: Row, classes: int) -> Config:
    size = SIZES[row.size]
    neck = "FPN" if row.fpn else "ChannelMapperWithPooling"
    return {
        "type": "MaskRCNN",
        "backbone": _backbone(row),
        "neck": {
            "type": neck,
            "in_channels": [size.dim] * 4,
            "out_channels": size.neck_width,
            "num_outs": 5,
        },
        "rpn_head": {
            "type": "RPNHead",
            "in_channels": size.neck_width,
            "feat_channels": size.neck_width,
            "anchor_generator": {
                "type": "AnchorGenerator",
                "scales": [size.anchor_scale],
                "ratios": list(ANCHOR_RATIOS),
                "strides": list(heads.RPN_STRIDES),
            },
            "bbox_coder": _coder(heads.RPN_STDS),
            "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0},
            "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
        },
        "roi_head": {
            "type": "StandardRoIHead",
            "bbox_roi_extractor": _roi_extractor(7, size),
            "bbox_head": {
                "type": "Shared2FCBBoxHead",
                "in_channels": size.neck_width,
                "fc_out_channels": size.box_width,
                "roi_feat_size": 7,
                "num_classes": classes,
                "bbox_coder": _coder(heads.BOX_STDS),
                "reg_class_agnostic": False,
                "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
                "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
            },
            "mask_roi_extractor": _roi_extractor(14, size),
            "mask_head": {
                "type": "FCNMaskHead",
                "num_convs": size.mask_convs,
                "in_channels": size.neck_width,
                "conv_out_channels": size.neck_width,
                "num_classes": classes,
                "loss_mask": {"type": "CrossEntropyLoss", "use_mask": True, "loss_weight": 1.0},
            },
        },
        "train_cfg": {
            "rpn": {
                **_sampling(0.7, 0.3, 0.3, count=256, positive=0.5, with_truth=False),
                "allowed_border": -1,
            },
            "rpn_proposal": _proposals(2000),
            "rcnn": {
                **_sampling(0.5, 0.5, 0.5, count=size.regions, positive=0.25, with_truth=True),
                "mask_size": 28,
            },
        },
        "test_cfg": {
            "rpn": _proposals(heads.PROPOSALS),
            "rcnn": {
                "score_thr": SCORE_THRESHOLD,
                "nms": {"type": "nms", "iou_threshold": heads.BOX_NMS},
                "max_per_img": heads.MAX_DETECTIONS,
                "mask_thr_binary": MASK_THRESHOLD,
            },
        },
    }


def _backbone(row: Row) -> Config:
    size = SIZES[row.size]
    depth = len(size.windows)
    quarter = depth // 4
    uniperceiver = row.pretraining_name.startswith("Uni-Perceiver")
    augreg = row.pretraining_name.startswith("AugReg")
    trunk = {
        "img_size": pretrain_grid(row) * PATCH,
        "pretrain_size": pretrain_grid(row) * PATCH,
        "patch_size": PATCH,
        "embed_dim": size.dim,
        "depth": depth,
        "num_heads": size.heads,
        "mlp_ratio": 4,
        "window_attn": list(size.windows),
        "window_size": [WINDOW if windowed else None for windowed in size.windows],
        "pretrained": AUGREG_L_PTH if augreg else row.pretraining_url or None,
    }
    if not row.has_adapter:
        ends = [quarter * (part + 1) - 1 for part in range(4)]
        return {
            "type": "ViTBaseline",
            **trunk,
            "drop_path_rate": size.plain_drop_path,
            "out_indices": ends,
        }
    spans = [[quarter * part, quarter * (part + 1) - 1] for part in range(4)]
    adapter = {
        "drop_path_rate": UNIPERCEIVER_DROP_PATH if uniperceiver else size.drop_path,
        "conv_inplane": size.stem_width,
        "n_points": POINTS,
        "deform_num_heads": size.deform_heads,
        "deform_ratio": size.deform_ratio,
        "cffn_ratio": CONV_FFN_RATIO,
        "interaction_indexes": spans,
    }
    if row.schedule == "1x":  # trained before the project had layer scales
        adapter["layer_scale"] = False
    return {"type": "UniPerceiverAdapter" if uniperceiver else "ViTAdapter", **trunk, **adapter}


def _coder(stds: tuple[float, float, float, float]) -> Config:
    return {
        "type": "DeltaXYWHBBoxCoder",
        "target_means": [0.0, 0.0, 0.0, 0.0],
        "target_stds": list(stds),
    }


def _roi_extractor(bins: int, size: Size) -> Config:
    return {
        "type": "SingleRoIExtractor",
        "roi_layer": {"type": "RoIAlign", "output_size": bins, "sampling_ratio": 0},
        "out_channels": size.neck_width,
        "featmap_strides": list(ROI_STRIDES),
        "finest_scale": size.finest_scale,
    }


def _proposals(before_suppression: int) -> Config:
    return {
        "nms_pre": before_suppression,
        "max_per_img": heads.PROPOSALS,
        "nms": {"type": "nms", "iou_threshold": heads.RPN_NMS},
        "min_bbox_size": 0,
    }


def _sampling(
    positive_iou: float,
    negative_iou: float,
    lowest_iou: float,
    *,
    count: int,
    positive: float,
    with_truth: bool,
) -> Config:
    return {
        "assigner": {
            "type": "MaxIoUAssigner",
            "pos_iou_thr": positive_iou,
            "neg_iou_thr": negative_iou,
            "min_pos_iou": lowest_iou,
            "match_low_quality": True,
            "ignore_iof_thr": -1,
        },
        "sampler": {
            "type": "RandomSampler",
            "num": count,
            "pos_fraction": positive,
            "neg_pos_ub": -1,
            "add_gt_as_proposals": with_truth,
        },
        "pos_weight": -1,
        "debug": False,
    }


def _data(row: Row, categories: tuple[str, ...]) -> Config:
    normalize: Config = {"type": "Normalize", "mean": row.mean, "std": row.std, "to_rgb": True}
    pad = {"type": "Pad", "size_divisor": 32}
    train: list[Config] = [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
        *_augmentation(row),
        normalize,
        pad,
        {"type": "DefaultFormatBundle"},
        {"type": "Collect", "keys": ["img", "gt_bboxes", "gt_labels", "gt_masks"]},
    ]
    test: list[Config] = [
        {"type": "LoadImageFromFile"},
        {
            "type": "MultiScaleFlipAug",
            "img_scale": row.input_size,
            "flip": False,
            "transforms": [
                {"type": "Resize", "keep_ratio": True},
                {"type": "RandomFlip"},
                normalize,
                pad,
                {"type": "DefaultFormatBundle"},
                {"type": "Collect", "keys": ["img"]},
            ],
        },
    ]

    def split(name: str, pipeline: list[Config]) -> Config:
        return {
            "type": "CocoDataset",
            "classes": categories,
            "ann_file": f"data/coco/annotations/instances_{name}2017.json",
            "img_prefix": f"data/coco/{name}2017/",
            "pipeline": pipeline,
        }

    return {
        "samples_per_gpu": 2,
        "workers_per_gpu": 2,
        "train": split("train", train),
        "val": split("val", test),
        "test": split("val", test),
    }


def _augmentation(row: Row) -> list[Config]:
    longest = row.input_size[0]
    flip = {"type": "RandomFlip", "flip_ratio": 0.5}
    if row.schedule == "1x":
        return [{"type": "Resize", "img_scale": row.input_size, "keep_ratio": True}, flip]

    def resize(sides: tuple[int, ...]) -> Config:
        return {
            "type": "Resize",
            "img_scale": [(side, longest) for side in sides],
            "multiscale_mode": "value",
            "keep_ratio": True,
        }

    def crop(size: tuple[int, int]) -> Config:
        return {
            "type": "RandomCrop",
            "crop_type": "absolute_range",
            "crop_size": size,
            "allow_negative_crop": True,
        }

    cropped = [
        resize(SHORT_SIDES_BEFORE_CROP),
        crop((384, 600)),
        {**resize(SHORT_SIDES), "override": True},
    ]
    return [
        flip,
        {"type": "AutoAugment", "policies": [[resize(SHORT_SIDES)], cropped]},
        crop((1024, 1024)),
    ]


def _schedule(row: Row) -> Config:
    short = row.schedule == "1x"
    optimizer: Config = {
        "type": "AdamW",
        "lr": 2e-4 if short else 1e-4,
        "weight_decay": 0.01 if short else 0.05,
    }
    rate = layer_decay.PUBLISHED.get(row.pretraining_name)
    if rate is not None:
        optimizer["constructor"] = "LayerDecayOptimizerConstructor"
        depth = len(SIZES[row.size].windows)
        optimizer["paramwise_cfg"] = {"num_layers": depth, "layer_decay_rate": rate}
    else:
        undecayed = ("level_embed", "pos_embed", "norm", "bias")
        optimizer["paramwise_cfg"] = {
            "custom_keys": {key: {"decay_mult": 0.0} for key in undecayed}
        }
    return {
        "optimizer": optimizer,
        "optimizer_config": {"grad_clip": None},
        "lr_config": {
            "policy": "step",
            "warmup": "linear",
            "warmup_iters": 500,
            "warmup_ratio": 0.001,
            "step": [8, 11] if short else [27, 33],
        },
        "runner": {"type": "EpochBasedRunner", "max_epochs": 12 if short else 36},
    }
