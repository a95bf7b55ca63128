"""The detector: Mask R-CNN, from images to detections or, in training, to losses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from vitadapter_zoo.catalog import COCO_CLASSES, Row
from vitadapter_zoo.detections import Detections, Instances
from vitadapter_zoo.errors import ImageError
from vitadapter_zoo.images import ImageInput, NetworkInput, network_input
from vitadapter_zoo.images.sources import Item, Source, batches, expand, expand_lazily, items
from vitadapter_zoo.models.boxes import ROI_STRIDES, box_limits
from vitadapter_zoo.models.constants import uploaded_batch
from vitadapter_zoo.models.graphs import Graphs
from vitadapter_zoo.models.heads import (
    Candidates,
    Pending,
    Proposals,
    RoIHead,
    RPNHead,
    downloaded,
    not_finite,
    suppressed,
)
from vitadapter_zoo.models.losses import losses
from vitadapter_zoo.models.modes import evaluating
from vitadapter_zoo.models.objects import Target
from vitadapter_zoo.models.precision import channels_last_weights, float32_precision

if TYPE_CHECKING:
    from typing_extensions import Self

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

    Attributes:
        allow_tf32: whether a float32 detector on CUDA may use TF32, which is several times faster
            and outside the tolerance of the comparison with the original; False at first.
        cuda_graphs: on CUDA, whether backbone, neck and proposal head are replayed as a CUDA graph
            from the third image of a padded shape on. Up to 8 shapes are kept, with the memory that
            their maps need. None, as at first, does so where many images are expected: in `stream`,
            ``verify`` and `detect` with ``repeated=True``. See `graphs.Graphs`.
    """

    allow_tf32: bool = False
    cuda_graphs: bool | None = None

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
        self.graphs: Graphs[tuple[list[Tensor], Candidates]] = Graphs()

    def preprocess(self, image: ImageInput) -> NetworkInput:
        """Decode, resize, normalise and pad one image, as in the evaluation of the row's weights.

        Args:
            image: see ``vitadapter_zoo.images.read_image``.

        Raises:
            ImageError: the input is not an image.
        """
        return network_input(image, self.row.input_size, self.row.mean, self.row.std)

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; training frees the CUDA graphs."""
        if mode:
            self.graphs.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:  # of .to(), .half(), .cuda(), ...
        self.graphs.clear()
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        channels_last_weights(self)
        return self

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
            ValueError: ``inputs`` is not a list; in training mode targets are missing or do not
                fit the images; in evaluation mode the inputs' padded shapes differ. ``predict``
                accepts images of different shapes.
        """
        if isinstance(inputs, (str, PathLike, bytes, NetworkInput)):
            raise ValueError(
                "the detector is called with a list, model([image]); model.predict(image) takes a "
                "single image too, and folders and videos"
            )
        prepared = [
            item if isinstance(item, NetworkInput) else self.preprocess(item) for item in inputs
        ]
        if not self.training:
            threshold = targets if isinstance(targets, float) else SCORE_THRESHOLD
            return self._detections(prepared, threshold, [None] * len(prepared))
        if isinstance(targets, (float, int)):
            raise ValueError(
                "the detector is in training mode and got no targets; call model(inputs, targets) "
                "for losses, or model.eval() first for detections"
            )
        return losses(self, prepared, targets)

    def _detections(
        self,
        inputs: Sequence[NetworkInput],
        score_threshold: float,
        images: Sequence[ImageInput | None],
        *,
        repeated: bool = False,
    ) -> list[Detections]:
        with torch.inference_mode():
            instances = self.detect(inputs, score_threshold, repeated=repeated)
        return [
            Detections.of(found, self.categories, image)
            for found, image in zip(instances, images, strict=True)
        ]

    def detect(
        self,
        inputs: Sequence[NetworkInput],
        score_threshold: float = SCORE_THRESHOLD,
        *,
        repeated: bool = False,
    ) -> list[Instances]:
        """Detect objects; leave the masks at 28x28 pixels instead of pasting them into the image.

        The network computes in evaluation mode and without gradients, and each module has its own
        mode afterwards. From a GPU everything is downloaded in one copy; the results are on the
        CPU.

        Args:
            inputs: outputs of ``preprocess`` whose tensors have the same shape.
            score_threshold: lowest score of a detection, 0..1.
            repeated: many images follow, so CUDA graphs are worth their capture; see
                ``cuda_graphs``.

        Raises:
            ValueError: the tensors' shapes differ; ``predict`` sorts that out.
            ZooError: the network computes NaN or infinite values.
        """
        shapes = {tuple(item.tensor.shape) for item in inputs}
        if len(shapes) != 1:
            raise ValueError(
                f"all images of a batch must have the same padded shape, got {sorted(shapes)}"
            )
        weights = next(self.parameters())
        wanted = repeated if self.cuda_graphs is None else self.cuda_graphs
        graphs = self.graphs if wanted and weights.device.type == "cuda" else None
        x = uploaded_batch([item.tensor for item in inputs], weights)
        limits = box_limits([item.resized for item in inputs], weights)
        with (
            evaluating(self),
            torch.no_grad(),  # with gradients, other kernels would give other last digits
            float32_precision(weights.device, allow_tf32=self.allow_tf32),
            contextlib.nullcontext() if graphs is None else graphs.lock,
        ):
            if graphs is None:
                maps, candidates = self._candidates(x, limits)
            else:
                parts = (self.backbone, self.neck, self.rpn_head)
                maps, candidates = graphs.run(
                    self._candidates, (x, limits), parts, key=self.allow_tf32
                )
            proposals = suppressed(candidates)
            found, complete = self._regions(
                maps, proposals, inputs, score_threshold, all_candidates=False
            )
            if not complete:
                found, _ = self._regions(
                    maps, proposals, inputs, score_threshold, all_candidates=True
                )
        return found

    def _candidates(self, x: Tensor, limits: Tensor) -> tuple[list[Tensor], Candidates]:
        """Compute the neck's maps and what enters non-maximum suppression.

        The shapes of all results depend on the shape of ``x`` only.

        Args:
            x: the images, ``[N, 3, H, W]``.
            limits: see `boxes.box_limits`.
        """
        maps: list[Tensor] = self.neck(self.backbone(x))
        return maps, self.rpn_head.candidates(self.rpn_head(maps), limits)

    def _regions(
        self,
        maps: list[Tensor],
        proposals: list[Proposals],
        inputs: Sequence[NetworkInput],
        score_threshold: float,
        *,
        all_candidates: bool,
    ) -> tuple[list[Instances], bool]:
        """Compute boxes and masks from the proposals.

        Args:
            maps: from the neck.
            proposals: per image.
            inputs: the images.
            score_threshold: lowest score of a detection, 0..1.
            all_candidates: wait for the number of candidates of each image, instead of taking a
                fixed number of them.

        Returns:
            The detections, and whether no image has more candidates than that number.
        """
        pending = Pending()
        pending.finite.append(torch.cat([found.scores for found in proposals]).isfinite().all())
        if not all(len(found.boxes) for found in proposals):  # where maps are NaN
            pending.finite.append(torch.stack([x.float().sum() for x in maps]).isfinite().all())
        sizes, scales = [item.resized for item in inputs], [item.scale for item in inputs]
        roi_maps = maps[: len(ROI_STRIDES)]
        found = self.roi_head.detect_boxes(
            roi_maps, proposals, sizes, scales, score_threshold, None if all_candidates else pending
        )
        masks = self.roi_head.predict_masks(roi_maps, found, scales)
        flags = torch.stack([*pending.finite, *pending.complete])
        parts, passed = downloaded(found, masks, flags)
        finite, complete = passed[: len(pending.finite)], passed[len(pending.finite) :]
        if not all(finite):
            raise not_finite()
        instances = [
            Instances(*part, item.original) for part, item in zip(parts, inputs, strict=True)
        ]
        return instances, all(complete)

    def predict(
        self,
        images: Source | Iterable[Source],
        score_threshold: float = SCORE_THRESHOLD,
        *,
        batch_size: int = 1,
    ) -> list[Detections]:
        """Detect objects in one or several images.

        The network computes in evaluation mode; every module's own mode is restored after each
        batch. The process's default dtype and device, and whether gradients are on, do not change
        the result. ``torch.autocast`` around the call does, because it is asked for there.

        Args:
            images: paths, folders, patterns like ``"*.jpg"``, http(s) URLs, bytes of image files,
                PIL images, uint8 RGB arrays ``[H, W, 3]`` or tensors ``[3, H, W]``, videos (each
                frame); or a list or an iterator of them. `stream` gives the results of a video as
                they come.
            score_threshold: lowest score kept, 0..1.
            batch_size: how many images may share a forward pass. Only neighbours of the same
                padded size do, so that the result of an image does not depend on the others.

        Returns:
            One ``Detections`` per image, in order.

        Raises:
            ImageError: an input is not an image.
            ValueError: ``batch_size`` below 1 or ``score_threshold`` outside 0..1.
        """
        sources = expand(images)
        if any(isinstance(source, int) for source in sources):
            raise ImageError(
                "an image is a path, a URL, bytes, a PIL image, an array or a tensor, not int; a "
                "camera has no last image: read it with model.stream(index)"
            )
        results = []
        for item, found in self.stream_items(
            items(sources), score_threshold, batch_size=batch_size
        ):
            if item.video is not None:
                found.image = None  # or all frames of the video would stay in memory
            results.append(found)
        return results

    def stream(
        self,
        source: Source | Iterable[Source],
        score_threshold: float = SCORE_THRESHOLD,
        *,
        batch_size: int = 1,
        stride: int = 1,
        max_frames: int | None = None,
    ) -> Iterator[Detections]:
        """Detect objects in a stream of images, in bounded memory.

        Args:
            source: what `predict` takes, or the index of a camera, which goes on until the
                iteration is left. Of an iterator one image is taken at a time.
            score_threshold: lowest score kept, 0..1.
            batch_size: see `predict`.
            stride: of a video every stride-th frame.
            max_frames: of each video at most as many frames.

        Yields:
            One ``Detections`` per image, with the frame of a video as its ``image``.

        Raises:
            ImageError: one of the inputs is not an image, or a video cannot be read.
            ValueError: an option outside its range.
        """
        chosen = expand_lazily(source) if isinstance(source, Iterator) else expand(source)
        images = items(chosen, stride=stride, max_frames=max_frames)
        found = self.stream_items(images, score_threshold, batch_size=batch_size, repeated=True)
        return (detections for _, detections in found)

    def stream_items(
        self,
        images: Iterator[Item],
        score_threshold: float,
        *,
        batch_size: int = 1,
        repeated: bool = False,
    ) -> Iterator[tuple[Item, Detections]]:
        """`stream` for images from ``sources.items``, each with its result.

        ``repeated`` is that of `detect`.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= score_threshold <= 1:
            raise ValueError(f"score_threshold must lie in 0..1, got {score_threshold}")
        prepared = ((item, self.preprocess(item.image)) for item in images)
        return (
            (item, detections)
            for batch in batches(prepared, batch_size)
            for (item, _), detections in zip(
                batch,
                self._detections(
                    [inputs for _, inputs in batch],
                    score_threshold,
                    [item.image for item, _ in batch],
                    repeated=repeated,
                ),
                strict=True,
            )
        )
