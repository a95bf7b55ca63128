"""Detectors as chains of stages, for timing: this package, the original in PyTorch, and mmdet."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import original
import standins
import torch
from torch import Tensor

from vitadapter_zoo import MaskRCNN
from vitadapter_zoo.images import NetworkInput
from vitadapter_zoo.models.heads import BoxDetections
from vitadapter_zoo.ops import paste_masks

STAGES = ("preprocess", "backbone", "neck", "rpn", "box head", "mask head", "paste")
SCORE = 0.05

# A stage gets the results of all earlier stages by name.
Found = dict[str, Any]
Chain = dict[str, Callable[[Found], Any]]


def native(model: MaskRCNN) -> Chain:
    """Build the chain of this package, in the dtype and on the device of the weights."""
    weights = next(model.parameters())

    def prepared(found: Found) -> NetworkInput:
        item: NetworkInput = found["preprocess"]
        return item

    return {
        "preprocess": lambda found: model.preprocess(standins.PHOTO),
        "backbone": lambda found: model.backbone(prepared(found).tensor.to(weights)),
        "neck": lambda found: model.neck(found["backbone"]),
        "rpn": lambda found: model.rpn_head.propose(found["neck"], [prepared(found).resized]),
        "box head": lambda found: model.roi_head.detect_boxes(
            found["neck"][:4],
            found["rpn"],
            [prepared(found).resized],
            [prepared(found).scale],
            SCORE,
        )[0],
        "mask head": lambda found: model.roi_head.predict_masks(
            found["neck"][:4], [found["box head"]], [prepared(found).scale]
        )[0],
        "paste": lambda found: paste_masks(
            found["mask head"], found["box head"].boxes, prepared(found).original, 0.5
        ),
    }


def plain(model: MaskRCNN) -> Chain:
    """Build the chain of the original implementation in plain PyTorch."""
    heads = model.roi_head
    weights = next(model.parameters())
    return {
        "preprocess": lambda found: model.preprocess(standins.PHOTO),
        "backbone": lambda found: original.backbone(
            model.backbone, found["preprocess"].tensor.to(weights)
        ),
        "neck": lambda found: original.neck(model.neck, found["backbone"]),
        "rpn": lambda found: original.propose(
            model.rpn_head, found["neck"], found["preprocess"].resized
        ),
        "box head": lambda found: original.detect_boxes(
            heads.bbox_head,
            found["neck"][:4],
            found["rpn"],
            found["preprocess"].resized,
            found["preprocess"].scale,
            SCORE,
        ),
        "mask head": lambda found: original.predict_masks(
            heads.mask_head, found["neck"][:4], found["box head"], found["preprocess"].scale
        ),
        "paste": lambda found: original.paste(
            found["mask head"], found["box head"].boxes, found["preprocess"].original, 0.5
        ),
    }


def mmdet(model: MaskRCNN) -> Chain:
    """Build the chain of mmdet's detector with the backbone of the original implementation."""
    import numpy as np
    from mmdet.datasets.pipelines import Compose

    detector: Any = import_module("vitadapter_zoo.backends.mmdet").from_native(model)
    heads = detector.roi_head
    pipeline = Compose(detector.cfg.data.test.pipeline)

    photo = {"img_info": {"filename": str(standins.PHOTO)}, "img_prefix": None}
    metas = [pipeline(dict(photo))["img_metas"][0].data]

    def boxes(found: Found) -> BoxDetections:
        rows, labels = heads.simple_test_bboxes(
            found["neck"], metas, found["rpn"], detector.test_cfg.rcnn, rescale=True
        )
        return BoxDetections(rows[0][:, :4], rows[0][:, 4], labels[0])

    def scaled(found: Found) -> Tensor:
        boxes: Tensor = found["box head"].boxes * torch.from_numpy(metas[0]["scale_factor"])
        return boxes

    def masks(found: Found) -> Tensor:
        rois = torch.nn.functional.pad(scaled(found), (1, 0))
        result: Tensor = heads._mask_forward(found["neck"], rois)["mask_pred"]
        return result

    def paste(found: Found) -> Tensor:
        labels = found["box head"].labels
        by_class = heads.mask_head.get_seg_masks(
            found["mask head"],
            scaled(found),
            labels,
            detector.test_cfg.rcnn,
            metas[0]["ori_shape"],
            metas[0]["scale_factor"],
            True,
        )
        taken = [iter(of_class) for of_class in by_class]
        return torch.from_numpy(np.stack([next(taken[label]) for label in labels.tolist()]))

    return {
        "preprocess": lambda found: pipeline(dict(photo))["img"][0].data[None],
        "backbone": lambda found: original.backbone(model.backbone, found["preprocess"]),
        "neck": lambda found: list(detector.neck(found["backbone"])),
        "rpn": lambda found: detector.rpn_head.simple_test_rpn(found["neck"], metas),
        "box head": boxes,
        "mask head": masks,
        "paste": paste,
    }


PEERS = {"plain": plain, "mmdet": mmdet}
