"""The detector: Mask R-CNN, from images to detections or, in training, to losses."""

from collections.abc import Iterator, Sequence
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from vitadapter_zoo.catalog import COCO_CLASSES, Row
from vitadapter_zoo.detections import Detections, Instances
from vitadapter_zoo.images import ImageInput, NetworkInput, network_input
from vitadapter_zoo.models.boxes import ROI_STRIDES
from vitadapter_zoo.models.heads import RoIHead, RPNHead
from vitadapter_zoo.models.losses import losses
from vitadapter_zoo.models.objects import Target
from vitadapter_zoo.ops import paste_masks

MASK_THRESHOLD = 0.5
SCORE_THRESHOLD = 0.05  # as the published AP was measured


class MaskRCNN(nn.Module):
    """A Mask R-CNN detector with its catalog row, which defines the preprocessing.

    ``model.backbone(x)`` returns four maps at strides 4, 8, 16 and 32. ``model.neck(maps)`` returns
    five maps of 256 channels at strides 4 to 64.

    Args:
        row: the catalog row of the network.
        backbone: maps ``[N, 3, H, W]`` to four maps.
        neck: maps the four maps to five maps.
        categories: names of the classes, in the order of the outputs.
        rpn_head: the proposal head; the default is that of the published networks.
        roi_head: the box and mask head; the default is that of the published networks.
    """

    def __init__(
        self,
        row: Row,
        backbone: nn.Module,
        neck: nn.Module,
        categories: tuple[str, ...] = COCO_CLASSES,
        *,
        rpn_head: RPNHead | None = None,
        roi_head: RoIHead | None = None,
    ) -> None:
        super().__init__()
        self.row = row
        self.categories = categories
        self.backbone = backbone
        self.neck = neck
        self.rpn_head = rpn_head or RPNHead()
        self.roi_head = roi_head or RoIHead(len(categories))

    def preprocess(self, image: ImageInput) -> NetworkInput:
        """Decode, resize, normalise and pad one image, as in the evaluation of the row's weights.

        Args:
            image: a path, the bytes of an image file, a PIL image or a uint8 RGB array.

        Raises:
            ImageError: the input is not an image.
        """
        return network_input(image, self.row.input_size, self.row.mean, self.row.std)

    def compile(self, **options: Any) -> None:
        """Compile backbone, neck and proposal head in place, with ``torch.compile``'s options.

        The first image of every padded size then takes a minute or more. State dicts do not
        change. The box and mask heads are not compiled, because their shapes depend on the number
        of proposals and detections.
        """
        for part in (self.backbone, self.neck, self.rpn_head):
            part.compile(**options)

    @overload
    def forward(
        self, inputs: Sequence[NetworkInput | ImageInput], targets: Sequence[Target]
    ) -> dict[str, Tensor]: ...

    @overload
    def forward(
        self, inputs: Sequence[NetworkInput | ImageInput], targets: float = SCORE_THRESHOLD
    ) -> list[Detections]: ...

    def forward(
        self,
        inputs: Sequence[NetworkInput | ImageInput],
        targets: Sequence[Target] | float = SCORE_THRESHOLD,
    ) -> dict[str, Tensor] | list[Detections]:
        """Return losses in training mode and detections in evaluation mode, like torchvision.

        Args:
            inputs: outputs of ``preprocess``, or images that ``preprocess`` accepts.
            targets: in training mode the objects of each image, see `losses.losses`. In evaluation
                mode the lowest score of a detection (0..1); training targets are ignored.

        Raises:
            ValueError: in training mode targets are missing or do not fit the images; in
                evaluation mode the inputs' padded shapes differ. ``predict`` accepts images of
                different shapes.
        """
        items = [
            item if isinstance(item, NetworkInput) else self.preprocess(item) for item in inputs
        ]
        if not self.training:
            return self._detections(
                items, targets if isinstance(targets, float) else SCORE_THRESHOLD
            )
        if isinstance(targets, (float, int)):
            raise ValueError(
                "the detector is in training mode and got no targets; call model(inputs, targets) "
                "for losses, or model.eval() first for detections"
            )
        return losses(self, items, targets)

    def _detections(
        self, inputs: Sequence[NetworkInput], score_threshold: float
    ) -> list[Detections]:
        return [
            Detections(
                boxes=found.boxes.cpu(),
                scores=found.scores.cpu(),
                labels=found.labels.cpu(),
                masks=paste_masks(
                    found.mask_probabilities, found.boxes, found.size, MASK_THRESHOLD
                ).cpu(),
                categories=self.categories,
            )
            for found in self.detect(inputs, score_threshold)
        ]

    def detect(
        self, inputs: Sequence[NetworkInput], score_threshold: float = SCORE_THRESHOLD
    ) -> list[Instances]:
        """Detect objects; leave the masks at 28x28 pixels instead of pasting them into the image.

        Args:
            inputs: outputs of ``preprocess`` whose tensors have the same shape.
            score_threshold: lowest score of a detection, 0..1.

        Raises:
            ValueError: the tensors' shapes differ. ``predict`` accepts images of different shapes.
        """
        shapes = {tuple(item.tensor.shape) for item in inputs}
        if len(shapes) != 1:
            raise ValueError(
                f"all images of a batch must have the same padded shape, got {sorted(shapes)}"
            )
        weights = next(self.parameters())
        x = torch.cat([item.tensor for item in inputs]).to(weights.device, weights.dtype)
        sizes = [item.resized for item in inputs]
        scales = [item.scale for item in inputs]
        maps: list[Tensor] = self.neck(self.backbone(x))
        proposals = self.rpn_head.propose(maps, sizes)
        roi_maps = maps[: len(ROI_STRIDES)]
        found = self.roi_head.detect_boxes(roi_maps, proposals, sizes, scales, score_threshold)
        masks = self.roi_head.predict_masks(roi_maps, found, scales)
        return [
            Instances(boxes, scores, labels, probabilities, item.original)
            for item, (boxes, scores, labels), probabilities in zip(
                inputs, found, masks, strict=True
            )
        ]

    @torch.inference_mode()
    def predict(
        self,
        images: ImageInput | Sequence[ImageInput],
        score_threshold: float = SCORE_THRESHOLD,
        *,
        batch_size: int = 1,
    ) -> list[Detections]:
        """Detect objects in one or several images.

        Args:
            images: an image or a sequence of images: paths, bytes of image files, PIL images or
                uint8 RGB arrays.
            score_threshold: lowest score of a detection, 0..1.
            batch_size: largest number of images in a forward pass. Only consecutive images of the
                same padded size share a pass, so no image's padding depends on other images.

        Returns:
            One ``Detections`` per image, in order.

        Raises:
            ImageError: an input is not an image.
            ValueError: ``batch_size`` below 1 or ``score_threshold`` outside 0..1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= score_threshold <= 1:
            raise ValueError(f"score_threshold must be in 0..1, got {score_threshold}")
        several = images if isinstance(images, (list, tuple)) else [images]
        inputs = (self.preprocess(image) for image in cast("Sequence[ImageInput]", several))
        return [
            detections
            for batch in _batches(inputs, batch_size)
            for detections in self._detections(batch, score_threshold)
        ]


def _batches(inputs: Iterator[NetworkInput], batch_size: int) -> Iterator[list[NetworkInput]]:
    """Group consecutive inputs of the same shape, at most ``batch_size`` at a time."""
    batch: list[NetworkInput] = []
    for item in inputs:
        if batch and (len(batch) == batch_size or item.tensor.shape != batch[0].tensor.shape):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch
