"""mmdet detectors with the weights and backbones of this package, in mmdet's own pipeline.

Importing this module registers the backbones, the channel mapper and the optimizer constructor.
"""

import copy
import os
import warnings
from typing import Any

import numpy as np
import torch
from torch import nn

from vitadapter_zoo.backends.comparison import Stages
from vitadapter_zoo.backends.mmdet_config import mmdet_config
from vitadapter_zoo.detections import Detections
from vitadapter_zoo.errors import BackendError
from vitadapter_zoo.images import ImageInput, read_image
from vitadapter_zoo.models import MaskRCNN

try:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "On January 1, 2023, MMCV will release v2.0.0")
        import mmcv
    import mmcv.ops  # the compiled part, which is missing from a plain mmcv
    from mmcv.runner import OPTIMIZER_BUILDERS
    from mmdet.apis import inference_detector
    from mmdet.models import BACKBONES, NECKS, build_detector
# A broken mmcv fails in many ways: a missing symbol, a refused version, an absent attribute.
except Exception as error:
    raise BackendError(
        "the mmdet backend needs mmdet 2.28 and mmcv-full 1.7.2 (not mmdet 3, not mmcv 2), which "
        f"cannot be imported here: {type(error).__name__}: {error}. "
        "`pip install 'vitadapter-zoo[mmdet]'` installs them where mmcv-full compiles; "
        "`make mmdet-env` in a clone builds them for current PyTorch into .venv-mmdet"
    ) from error

from vitadapter_zoo.backends.mmdet import modules, optimizer

for _backbone in (
    modules.ViTAdapter,
    modules.ViTBaseline,
    modules.UniPerceiverAdapter,
):
    BACKBONES.register_module(module=_backbone)
NECKS.register_module(module=modules.ChannelMapperWithPooling)
OPTIMIZER_BUILDERS.register_module(module=optimizer.LayerDecayOptimizerConstructor)


def from_native(model: MaskRCNN) -> nn.Module:
    """The same detector as a ``mmdet.models.MaskRCNN``, in evaluation mode.

    ``CLASSES`` and ``cfg`` are set as ``mmdet.apis.inference_detector`` and mmdet's test loop
    expect. The weights are shared, not copied.

    Args:
        model: float32, on any device.

    Raises:
        BackendError: the weights are not float32; mmdet has its own lower-precision mode.
    """
    weights = next(model.parameters())
    if weights.dtype != torch.float32:
        raise BackendError(
            f"mmdet runs float32 weights, not {weights.dtype}: load without dtype, and use mmcv's "
            "wrap_fp16_model for half precision"
        )
    config = mmcv.Config(mmdet_config(model.row, model.categories))
    # For a row trained without layer scales, the checkpoint has them filled with ones.
    config.model.backbone.pop("layer_scale", None)
    detector: Any = build_detector(config.model)
    detector.load_state_dict(model.state_dict(), strict=True, assign=True)
    detector.CLASSES = model.categories
    detector.cfg = config
    ready: nn.Module = detector.to(weights.device).eval()
    return ready


def detect(model: nn.Module, image: ImageInput) -> Detections:
    """Run one image through mmdet's own test pipeline, ``inference_detector``.

    Args:
        model: from ``vitadapter_zoo.load(name, backend="mmdet")``.
        image: a path, which mmdet decodes itself; or the bytes of an image file, a PIL image or a
            uint8 RGB array.

    Returns:
        The detections with a score of at least the configuration's ``score_thr``, best first.

    Raises:
        ImageError: not an image.
    """
    rgb = read_image(image)
    detector: Any = model
    config = detector.cfg
    # inference_detector changes the configuration for arrays, after which it cannot load files.
    detector.cfg = copy.deepcopy(config)
    try:
        result = inference_detector(detector, _as_mmdet_takes_it(image, rgb))
    finally:
        detector.cfg = config
    categories: Any = detector.CLASSES
    return _detections(result, (rgb.shape[0], rgb.shape[1]), tuple(categories))


def stages(model: nn.Module, image: ImageInput) -> Stages:
    """The intermediate results of ``inference_detector`` on one image.

    Arguments and errors are those of ``detect``.
    """
    seen: dict[str, Any] = {}

    def called(_module: nn.Module, _args: Any, arguments: dict[str, Any]) -> None:
        seen.update(arguments)

    def returned(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            seen[name] = output

        return hook

    hooks = [
        model.register_forward_pre_hook(called, with_kwargs=True),
        *(
            model.get_submodule(name).register_forward_hook(returned(name))
            for name in ("backbone", "neck", "rpn_head")
        ),
    ]
    try:
        detections = detect(model, image)
    finally:
        for hook in hooks:
            hook.remove()
    metas = seen["img_metas"][0]
    rpn_head: Any = model.get_submodule("rpn_head")
    with torch.no_grad():
        proposals = rpn_head.get_bboxes(*seen["rpn_head"], img_metas=metas)
    return Stages(
        input=seen["img"][0].cpu(),
        resized=tuple(metas[0]["img_shape"][:2]),
        original=tuple(metas[0]["ori_shape"][:2]),
        scale=tuple(metas[0]["scale_factor"].tolist()),
        backbone=[x.cpu() for x in seen["backbone"]],
        neck=[x.cpu() for x in seen["neck"]],
        proposals=proposals[0][:, :4].cpu(),
        proposal_scores=proposals[0][:, 4].cpu(),
        detections=detections,
    )


def _as_mmdet_takes_it(image: ImageInput, rgb: np.ndarray[Any, Any]) -> Any:
    """A path, or the image as mmcv's decoder returns it: BGR."""
    if isinstance(image, (str, os.PathLike)):
        return os.fspath(image)
    return np.ascontiguousarray(rgb[:, :, ::-1])


def _detections(result: Any, size: tuple[int, int], categories: tuple[str, ...]) -> Detections:
    """Join the lists per class, boxes ``[N, 5]`` and masks ``[H, W]``, best score first."""
    boxes_by_class, masks_by_class = result
    labels = [
        torch.full((len(boxes),), label, dtype=torch.int64)
        for label, boxes in enumerate(boxes_by_class)
    ]
    boxes = torch.from_numpy(np.concatenate(boxes_by_class)).float()
    masks = [mask for masks in masks_by_class for mask in masks]
    stacked = np.stack(masks) if masks else np.zeros((0, *size), bool)
    order = boxes[:, 4].argsort(descending=True, stable=True)
    return Detections(
        boxes=boxes[order, :4],
        scores=boxes[order, 4],
        labels=torch.cat(labels)[order],
        masks=torch.from_numpy(stacked)[order],
        categories=categories,
    )
