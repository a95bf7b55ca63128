"""What a detector found in one image, and the forms in which others want it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from vitadapter_zoo.catalog import COCO_CLASSES
from vitadapter_zoo.detections import conversions, notebook, records
from vitadapter_zoo.detections import masks as masks_of
from vitadapter_zoo.detections.drawing import draw, regions
from vitadapter_zoo.detections.indexing import positions
from vitadapter_zoo.detections.instances import Instances
from vitadapter_zoo.detections.masks import MaskMaps, Masks
from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.images import ImageInput, read_image
from vitadapter_zoo.text import quoted, shown

if TYPE_CHECKING:
    import pandas
    import supervision


class Detections:
    """Detections of one image, best score first; all tensors are on the CPU.

    ``detections[i]``, ``detections[2:5]`` and ``detections[detections.scores > 0.5]`` are
    ``Detections`` again, and so is what iteration gives, one detection each.

    Attributes:
        boxes: float32 ``[N, 4]`` as (x1, y1, x2, y2) in image pixels.
        scores: float32 ``[N]`` in 0..1.
        labels: int64 ``[N]``, index into ``categories`` (0..79 for COCO).
        categories: name of every class that the model knows.
        image: the image that they were found in, as it was given; None where it is not known.

    The constructor takes the attributes, and as ``masks`` bool ``[N, H, W]`` or the network's
    probabilities with their boxes (``MaskMaps``).

    Raises:
        ValueError: the tensors do not have one length.
    """

    def __init__(
        self,
        boxes: Tensor,
        scores: Tensor,
        labels: Tensor,
        masks: Masks,
        categories: tuple[str, ...] = COCO_CLASSES,
        image: ImageInput | None = None,
    ) -> None:
        count = len(masks.boxes if isinstance(masks, MaskMaps) else masks)
        if not len(boxes) == len(scores) == len(labels) == count:
            raise ValueError(
                f"{len(boxes)} boxes, {len(scores)} scores, {len(labels)} labels and {count} masks "
                "are not of one set of detections"
            )
        self.boxes = boxes
        self.scores = scores
        self.labels = labels
        self.categories = categories
        self.image = image
        self._masks = masks

    @classmethod
    def of(
        cls, found: Instances, categories: tuple[str, ...], image: ImageInput | None = None
    ) -> Detections:
        """The network's detections, on the CPU and as ordinary tensors.

        Raises:
            ZooError: a box or a mask is NaN or infinite.
        """
        # Copies made in inference mode could not be changed in place nor take part in autograd.
        with torch.inference_mode(False), torch.no_grad():
            boxes, scores, labels, probabilities = (
                tensor.detach().cpu().clone()
                for tensor in (found.boxes, found.scores, found.labels, found.mask_probabilities)
            )
            if not (boxes.isfinite().all() and probabilities.isfinite().all()):
                raise ZooError(
                    "the network gives boxes or masks that are NaN or infinite; check its weights"
                )
            maps = MaskMaps(probabilities, boxes.clone(), found.size)
        return cls(boxes, scores, labels, maps, categories, image)

    @property
    def masks(self) -> Tensor:
        """Bool ``[N, H, W]``, the image's size.

        The tensor is made at the first use and kept. It has N bytes for each pixel of the image;
        ``draw``, ``to_coco``, ``to_json`` and ``save`` do without it.
        """
        if isinstance(self._masks, MaskMaps):
            with torch.inference_mode(False), torch.no_grad():
                self._masks = masks_of.dense(self._masks)
        return self._masks

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image in pixels."""
        return masks_of.size_of(self._masks)

    @property
    def class_names(self) -> list[str]:
        """The name of each detection's class, in order."""
        return [self.categories[label] for label in self.labels.tolist()]

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detections]:
        return (self[index] for index in range(len(self)))

    def __getitem__(
        self, index: int | slice | Sequence[int] | Sequence[bool] | Tensor | npt.NDArray[Any]
    ) -> Detections:
        """One detection, or those of a slice, a bool mask ``[N]`` or a list of indices.

        Raises:
            IndexError: no detection has that index, or the mask is not one bool for each.
            TypeError: the index is nothing of the above.
        """
        chosen = positions(index, len(self))
        return Detections(
            boxes=self.boxes[chosen],
            scores=self.scores[chosen],
            labels=self.labels[chosen],
            masks=masks_of.take(self._masks, chosen),
            categories=self.categories,
            image=self.image,
        )

    def filter(self, score: float) -> Detections:
        """Only the detections with at least this score (0..1)."""
        return self[self.scores >= score]

    def with_classes(self, *names: str) -> Detections:
        """Only the detections of these classes.

        Raises:
            ZooError: a name that is not in ``categories``; the message offers the nearest.
        """
        for name in names:
            if name not in self.categories:
                near = difflib.get_close_matches(name, self.categories, n=3, cutoff=0.4)
                hint = f": did you mean {', '.join(map(shown, near))}?" if near else ""
                raise ZooError(f"the model has no class {quoted(name)}{hint}")
        labels = [label for label, name in enumerate(self.categories) if name in names]
        return self[torch.isin(self.labels, torch.tensor(labels, dtype=torch.int64, device="cpu"))]

    def resized(self, height: int, width: int) -> Detections:
        """The detections on the same image after it is resized.

        Args:
            height: of the resized image in pixels, at least 1.
            width: likewise.

        Returns:
            Detections that do not know their image.

        Raises:
            ValueError: a side below 1.
        """
        if min(height, width) < 1:
            raise ValueError(f"an image cannot be resized to {width} x {height} pixels")
        return Detections(
            boxes=self.boxes * masks_of.scales(self.size, (height, width)),
            scores=self.scores,
            labels=self.labels,
            masks=masks_of.resized(self._masks, (height, width)),
            categories=self.categories,
        )

    def to_coco(
        self,
        image_id: int,
        *,
        category_ids: Sequence[int] | Mapping[str, int] | None = None,
    ) -> list[dict[str, Any]]:
        """COCO results: one JSON-ready dictionary per detection.

        Each has ``image_id``, ``category_id``, ``bbox`` ``[x, y, width, height]`` in image pixels,
        ``score`` and ``segmentation`` (compressed RLE). When masks are scored, leave ``bbox`` out:
        pycocotools takes the box's area for the mask's otherwise.

        Args:
            image_id: of the image in the annotations.
            category_ids: the data set's id of each class, by class name or in the order of
                ``categories``. COCO's own, which leave out ten numbers, by default.

        Raises:
            ZooError: the classes are not COCO's 80 and no ids are given, or a class has no id.
        """
        return records.coco_results(self, image_id, category_ids)

    def run_lengths(self) -> list[str]:
        """The masks as counts of COCO's compressed RLE."""
        return masks_of.run_lengths(self._masks)

    def mask_areas(self) -> list[int]:
        """How many pixels each mask has."""
        return masks_of.areas(self._masks)

    def to_records(self) -> list[dict[str, Any]]:
        """One JSON-ready dictionary per detection, for any classes.

        Each has ``name``, ``label``, ``score``, ``box`` (x1, y1, x2, y2) in image pixels and
        ``segmentation`` (COCO's compressed RLE).
        """
        return records.records(self)

    def to_json(self) -> str:
        """JSON: an object with ``size`` (height, width) and ``detections``, see `to_records`."""
        return json.dumps({"size": list(self.size), "detections": self.to_records()})

    def to_dataframe(self) -> pandas.DataFrame:
        """A pandas table: name, label, score, x1, y1, x2, y2 and ``area`` (pixels of the mask).

        Raises:
            ZooError: pandas is not installed.
        """
        return conversions.to_dataframe(self)

    def to_supervision(self, *, masks: bool = True) -> supervision.Detections:
        """As ``supervision.Detections``, with ``class_name`` in its ``data``.

        Args:
            masks: False leaves the masks out, which take N bytes for each pixel of the image.

        Raises:
            ZooError: supervision is not installed.
        """
        return conversions.to_supervision(self, with_masks=masks)

    @classmethod
    def from_supervision(
        cls,
        found: supervision.Detections,
        *,
        categories: tuple[str, ...] = COCO_CLASSES,
        size: tuple[int, int] | None = None,
        image: ImageInput | None = None,
    ) -> Detections:
        """What `to_supervision` made, after supervision's own filters for instance.

        Args:
            found: with masks, scores (``confidence``) and ``class_id``.
            categories: name of every class.
            size: (height, width) of the image; needed where nothing was found and ``found`` has
                no masks.
            image: that they belong to, for ``draw``.

        Raises:
            ZooError: there are no masks, scores or classes, a class has no name, or the names in
                ``found`` are not those of ``categories``.
        """
        conversions.check_names(found, categories)
        boxes, scores, labels, masks = conversions.from_supervision(found, len(categories), size)
        return cls(boxes, scores, labels, masks, categories, image)

    def crops(self, image: ImageInput | None = None) -> list[Image.Image]:
        """The part of the image in each box, at least one pixel.

        Args:
            image: the image that was given to ``predict``; the known one by default.

        Raises:
            ZooError: no image is known, or it has another size.
            ImageError: not an image.
        """
        rgb = self._pixels(image)
        return [Image.fromarray(rgb[place].copy()) for place in regions(self.boxes, self.size)]

    def draw(
        self,
        image: ImageInput | None = None,
        *,
        alpha: float = 0.5,
        labels: bool | Sequence[str] = True,
        masks: bool = True,
    ) -> Image.Image:
        """The image with masks, boxes, class names and scores on it.

        Lines and text grow with the image. Classes differ in hue, instances of a class in shade.

        Args:
            image: the image that was given to ``predict``, in any of its forms; the known one by
                default.
            alpha: how much of a mask's colour covers the image, 0..1.
            labels: False leaves the names out; a list has a text for each detection.
            masks: False draws boxes only.

        Raises:
            ZooError: no image is known, or it has another size than the one these detections
                belong to.
            ImageError: not an image.
            ValueError: ``alpha`` outside 0..1, or another number of labels than detections.
        """
        if isinstance(labels, bool):
            scores = self.scores.tolist()
            texts = [f"{n} {s:.2f}" for n, s in zip(self.class_names, scores, strict=True)]
            texts = texts if labels else []
        else:
            texts = list(labels)
            if len(texts) != len(self):
                raise ValueError(f"{len(texts)} labels for {len(self)} detections")
        canvas = self._pixels(image).copy()
        return draw(
            canvas,
            self.boxes.detach(),
            self.labels.tolist(),
            texts,
            self._masks if masks else None,
            alpha,
        )

    def save(self, path: str | PathLike[str], image: ImageInput | None = None) -> None:
        """Write ``path``: JSON (see `to_json`) where it ends in .json, else the drawn picture.

        Args:
            path: where to; an existing file is replaced, except the image itself.
            image: see `draw`.

        Raises:
            ZooError: the path cannot be written to, is the image that they were found in, or has
                an ending that no picture format has.
        """
        from vitadapter_zoo.detections import output_files as outputs

        target = outputs.checked(path, [self.image if image is None else image])
        if target.suffix.lower() == ".json":
            outputs.write(target, self.to_json().encode())
        else:
            outputs.write_picture(target, self.draw(image))

    def _pixels(self, image: ImageInput | None) -> npt.NDArray[np.uint8]:
        """The image, uint8 RGB ``[H, W, 3]``, checked to be the one the detections belong to."""
        given = self.image if image is None else image
        if given is None:
            raise ZooError("these detections do not know their image: give it as image=...")
        rgb = read_image(given)
        height, width = self.size
        if rgb.shape[:2] != (height, width):
            raise ZooError(
                f"the picture is {rgb.shape[1]} x {rgb.shape[0]} pixels, the detections belong to "
                f"one of {width} x {height}; draw on the same image"
            )
        return rgb

    def __repr__(self) -> str:
        """Two lines: how many of which class, and the best of them."""
        return notebook.text(self)

    def _repr_png_(self) -> bytes | None:
        """The picture for notebooks; None where the image is not known."""
        return notebook.png(self)

    def _repr_html_(self) -> str | None:
        """The picture and a table for notebooks; None where the image is not known."""
        return notebook.page(self)
