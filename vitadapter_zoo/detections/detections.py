"""The detections of one image: filter, draw, save and convert them."""

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
        categories: names of all classes of the model.
        image: the image as it was given to the model; None if unknown.

    The constructor takes the attributes, and as ``masks`` bool ``[N, H, W]`` or the network's
    probabilities with their boxes (``MaskMaps``).

    Raises:
        ValueError: the tensors have different lengths.
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
        """Convert the network's output to detections with ordinary tensors on the CPU.

        Raises:
            ZooError: a box or a mask has NaN or infinite values.
        """
        # Tensors made in inference mode cannot be changed in place or used with autograd.
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

        The tensor is computed at the first access and kept. It takes N bytes per pixel of the
        image; ``draw``, ``to_coco``, ``to_json`` and ``save`` do not need it.
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
        """Select detections by an integer, a slice, a bool mask ``[N]`` or a list of integers.

        Raises:
            IndexError: an index is out of range, or the mask does not have N values.
            TypeError: the index is of another kind.
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
        """Return the detections with at least this score (0..1)."""
        return self[self.scores >= score]

    def with_classes(self, *names: str) -> Detections:
        """Return the detections of these classes.

        Raises:
            ZooError: a name is not in ``categories``; the message suggests similar names.
        """
        for name in names:
            if name not in self.categories:
                near = difflib.get_close_matches(name, self.categories, n=3, cutoff=0.4)
                hint = f": did you mean {', '.join(map(shown, near))}?" if near else ""
                raise ZooError(f"the model has no class {quoted(name)}{hint}")
        labels = [label for label, name in enumerate(self.categories) if name in names]
        return self[torch.isin(self.labels, torch.tensor(labels, dtype=torch.int64, device="cpu"))]

    def resized(self, height: int, width: int) -> Detections:
        """Return the detections for a resized version of the image.

        Args:
            height: of the resized image in pixels, at least 1.
            width: likewise.

        Returns:
            Detections whose ``image`` is None.

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
        """Convert to COCO results: one JSON-ready dictionary per detection.

        Each has ``image_id``, ``category_id``, ``bbox`` ``[x, y, width, height]`` in image pixels,
        ``score`` and ``segmentation`` (compressed RLE). To score masks with pycocotools, remove
        ``bbox``: otherwise it uses the box's area as the mask's.

        Args:
            image_id: the image's id in the annotations.
            category_ids: the data set's id of each class, by class name or in the order of
                ``categories``; by default COCO's ids, which run from 1 to 90 with gaps.

        Raises:
            ZooError: the classes are not COCO's 80 and no ids are given, or a class has no id.
        """
        return records.coco_results(self, image_id, category_ids)

    def run_lengths(self) -> list[str]:
        """Encode the masks as the counts of COCO's compressed RLE."""
        return masks_of.run_lengths(self._masks)

    def mask_areas(self) -> list[int]:
        """Return the number of pixels of each mask."""
        return masks_of.areas(self._masks)

    def to_records(self) -> list[dict[str, Any]]:
        """Convert to one JSON-ready dictionary per detection, for any classes.

        Each has ``name``, ``label``, ``score``, ``box`` (x1, y1, x2, y2) in image pixels and
        ``segmentation`` (COCO's compressed RLE).
        """
        return records.records(self)

    def to_json(self) -> str:
        """Convert to JSON with ``size`` (height, width) and ``detections``, see `to_records`."""
        return json.dumps({"size": list(self.size), "detections": self.to_records()})

    def to_dataframe(self) -> pandas.DataFrame:
        """Convert to a pandas table: name, label, score, x1, y1, x2, y2, and the mask's ``area``.

        Raises:
            ZooError: pandas is not installed.
        """
        return conversions.to_dataframe(self)

    def to_supervision(self, *, masks: bool = True) -> supervision.Detections:
        """Convert to ``supervision.Detections``, with ``class_name`` in its ``data``.

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
        """Convert back from `to_supervision`, for example after supervision's own filters.

        Args:
            found: detections with masks, scores (``confidence``) and ``class_id``.
            categories: names of all classes.
            size: (height, width) of the image; needed if ``found`` is empty and has no masks.
            image: the image, for ``draw``.

        Raises:
            ZooError: there are no masks, scores or classes, a class has no name, or the names in
                ``found`` are not those of ``categories``.
        """
        conversions.check_names(found, categories)
        boxes, scores, labels, masks = conversions.from_supervision(found, len(categories), size)
        return cls(boxes, scores, labels, masks, categories, image)

    def crops(self, image: ImageInput | None = None) -> list[Image.Image]:
        """Return the part of the image inside each box, at least one pixel.

        Args:
            image: the image that was given to ``predict``; by default ``self.image``.

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
        """Draw masks, boxes, class names and scores on the image.

        Line width and text size depend on the image's size. Classes differ in hue, instances of a
        class in shade.

        Args:
            image: the image that was given to ``predict``, in any of its forms; by default
                ``self.image``.
            alpha: opacity of the masks, 0..1.
            labels: False draws no names; a list has a text per detection.
            masks: False draws only boxes.

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
            path: the output file; an existing file is replaced, except the image itself.
            image: see `draw`.

        Raises:
            ZooError: the path cannot be written to, is the image itself, or has an ending of no
                picture format.
        """
        from vitadapter_zoo.detections import output_files as outputs

        target = outputs.checked(path, [self.image if image is None else image])
        if target.suffix.lower() == ".json":
            outputs.write(target, self.to_json().encode())
        else:
            outputs.write_picture(target, self.draw(image))

    def _pixels(self, image: ImageInput | None) -> npt.NDArray[np.uint8]:
        """Read the image, uint8 RGB ``[H, W, 3]``, and check that its size is the detections'."""
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
        """Return two lines: the count of each class, and the best detections."""
        return notebook.text(self)

    def _repr_png_(self) -> bytes | None:
        """Return the picture for notebooks; None if the image is unknown."""
        return notebook.png(self)

    def _repr_html_(self) -> str | None:
        """Return the picture and a table for notebooks; None if the image is unknown."""
        return notebook.page(self)
