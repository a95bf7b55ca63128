"""COCO's 12 figures, AP by class and the matching of detections, computed by hotcoco.

hotcoco has the interface of pycocotools and computes the same figures to the last digit. No other
module uses it for scoring.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from vitadapter_zoo._version import __version__
from vitadapter_zoo.evaluation import ids
from vitadapter_zoo.evaluation.dataset import Dataset
from vitadapter_zoo.evaluation.ids import Id
from vitadapter_zoo.evaluation.run import ImageResult

Kind = Literal["box", "mask"]
KINDS: tuple[Kind, Kind] = ("box", "mask")
Floats = npt.NDArray[np.float64]

_IOU_TYPES = {"box": "bbox", "mask": "segm"}
ALL, SMALL, MEDIUM, LARGE = range(4)  # COCO's area ranges: split at 32 x 32 and 96 x 96 pixels
MAX_DETECTIONS = (1, 10, 100)
NOTHING = -1.0  # COCO's figure if no object is annotated
FIGURES = (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
)  # fmt: skip
MEANINGS = {
    "AP": "IoU 0.50:0.95", "AP50": "IoU 0.50", "AP75": "IoU 0.75",
    "APs": "small objects, below 32 x 32 pixels", "APm": "medium objects",
    "APl": "large objects, above 96 x 96 pixels",
    "AR1": "recall, 1 detection an image", "AR10": "recall, 10 detections an image",
    "AR100": "recall, 100 detections an image", "ARs": "recall, small objects",
    "ARm": "recall, medium objects", "ARl": "recall, large objects",
}  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """COCO's figures for boxes or for masks; in 0..1, or -1 if no object is annotated.

    Attributes:
        figures: COCO's 12 figures by the names in ``FIGURES``.
        per_class: AP by class name.
        per_class_50: AP at IoU 0.5 by class name.
        precision: float64 ``[10, 101, K, 4, 3]``: IoU 0.50:0.05:0.95, recall 0:0.01:1, class,
            area (all, small, medium, large), 1, 10 and 100 detections.
    """

    figures: dict[str, float]
    per_class: dict[str, float]
    per_class_50: dict[str, float]
    precision: Floats

    @property
    def ap(self) -> float:
        """AP over IoU 0.50:0.05:0.95, 0..1."""
        return self.figures["AP"]


@dataclass(frozen=True)
class Matches:
    """The detections of a class and whether each matches an object, best score first.

    Attributes:
        images: int64 ``[D]``, index of each detection's image in the table.
        found: bool ``[10, D]``: matched with an object, by IoU threshold.
        counted: bool ``[10, D]``: not matched with a crowd and not ignored otherwise.
        objects: float64 ``[I]``: objects of the class in each image, without crowds.
    """

    images: npt.NDArray[np.int64]
    found: npt.NDArray[np.bool_]
    counted: npt.NDArray[np.bool_]
    objects: Floats


@dataclass(frozen=True)
class Table:
    """Results of several images in one table, for both kinds; ``Annotations.tabulate`` makes it.

    The scorer computes with float64, in which large ids are rounded. It gets numbers from 1 on
    instead, in the order of the ids.

    Attributes:
        images: numbers of the images, in order, those without detections too.
        rows: float64 ``[D, 7]``: image number, x, y, width, height, score, category number.
        masks: COCO's RLE of each row.
    """

    images: list[int]
    rows: Floats
    masks: list[Any]


@dataclass(frozen=True)
class Unmatched:
    """The mistakes in an image at IoU 0.5; crowds are left out.

    Attributes:
        missed: ids of the annotations that no detection of their class matches.
        false: indices, in the image's result, of the detections that match no object.
    """

    missed: tuple[Id, ...]
    false: tuple[int, ...]


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Pause garbage collection: with half a million new dictionaries it takes most of the time."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()


class Annotations:
    """The annotations of a data set as hotcoco holds them, for both kinds."""

    def __init__(self, data: Dataset) -> None:
        from hotcoco import COCO

        self._data = data
        self._image_numbers = _numbers(image.image_id for image in data.images)
        names = dict(data.categories)
        self._category_numbers = _numbers(names)
        self.category_names = [names[key] for key in self._category_numbers]
        self._coco = COCO(_as_coco(data, self._image_numbers, self._category_numbers))

    def tabulate(self, results: Sequence[ImageResult]) -> Table:
        """One table of all detections, ordered by image id, which decides between equal scores.

        Args:
            results: at most one for each image of the data set.
        """
        numbered = sorted(
            ((self._image_numbers[result.image_id], result) for result in results),
            key=lambda pair: pair[0],
        )
        rows = np.empty((sum(len(result.scores) for result in results), 7))
        masks: list[Any] = []
        start = 0
        with _without_collection():
            for number, result in numbered:
                block = rows[start : start + len(result.scores)]
                if len(block):
                    block[:, 0] = number
                    block[:, 1:5] = result.boxes
                    block[:, 5] = result.scores
                    block[:, 6] = [self._category_numbers[key] for key in result.category_ids]
                    masks += result.segmentations()
                start += len(block)
        return Table([number for number, _ in numbered], rows, masks)

    def score(self, table: Table, kind: Kind) -> Scores:
        """COCO's figures over the images of the table.

        Args:
            table: from ``Annotations.tabulate``.
            kind: what is compared, boxes or masks.
        """
        evaluation = self._evaluate(table, kind)
        evaluation.accumulate()
        curves = evaluation.eval
        return _summarize(curves["precision"], curves["recall"], self.category_names)

    def matches(self, table: Table, kind: Kind) -> list[Matches]:
        """The matching that the AP over all areas is computed from, by class.

        Args:
            table: from ``Annotations.tabulate``; the matches index its images.
            kind: what is compared, boxes or masks.
        """
        evaluation = self._evaluate(table, kind, every_area=False)
        places = {number: place for place, number in enumerate(table.images)}
        by_class: dict[int, list[dict[str, Any]]] = {
            number: [] for number in self._category_numbers.values()
        }
        for entry in evaluation.eval_imgs:
            if entry is not None:
                by_class[entry["category_id"]].append(entry)
        return [_matches(entries, places) for entries in by_class.values()]

    def unmatched(self, results: Sequence[ImageResult], kind: Kind) -> list[Unmatched]:
        """Missed objects and false detections of each image, by COCO's matching at IoU 0.5.

        Args:
            results: one per image, with the detections that count.
            kind: what is compared, boxes or masks.

        Returns:
            One entry for each of ``results``, in the same order.
        """
        found = self._evaluate(self.tabulate(results), kind, every_area=False)
        found = found.image_diagnostics(iou_thr=0.5)
        missed: dict[Id, list[Id]] = {result.image_id: [] for result in results}
        for number, status in sorted(found["gt_status"].items()):
            if status == "fn":
                one = self._data.objects[number - 1]
                missed[one.image_id].append(one.annotation_id)
        false: dict[Id, list[int]] = {}
        first = 1  # hotcoco numbers the detections in the order of the images
        for result in sorted(results, key=lambda one: self._image_numbers[one.image_id]):
            places = range(len(result.scores))
            statuses = [found["dt_status"].get(first + place) for place in places]
            false[result.image_id] = [place for place in places if statuses[place] == "fp"]
            first += len(places)
        return [
            Unmatched(tuple(missed[result.image_id]), tuple(false[result.image_id]))
            for result in results
        ]

    def _evaluate(self, table: Table, kind: Kind, *, every_area: bool = True) -> Any:
        from hotcoco import COCOeval

        if kind == "box":
            detections = self._coco.load_res(table.rows)
        else:
            detections = self._coco.load_res(table.rows, segmentation=table.masks)
            if table.masks:  # the size of a mask is its own area, not that of its box
                from hotcoco import mask

                areas = np.asarray(mask.area(table.masks), np.float64)
                detections.update_anns(ids=np.arange(1, len(areas) + 1), area=areas)
        evaluation = COCOeval(self._coco, detections, _IOU_TYPES[kind])
        evaluation.params.img_ids = table.images
        if not every_area:
            evaluation.params.area_rng = evaluation.params.area_rng[:1]
            evaluation.params.area_rng_lbl = evaluation.params.area_rng_lbl[:1]
        evaluation.evaluate()
        return evaluation


def _numbers(keys: Iterable[Id]) -> dict[Id, int]:
    """Numbers from 1 on for ids, in their order."""
    return {key: number for number, key in enumerate(sorted(keys, key=ids.order), start=1)}


def _as_coco(
    data: Dataset, image_numbers: dict[Id, int], category_numbers: dict[Id, int]
) -> dict[str, list[dict[str, Any]]]:
    """What COCO's evaluation looks at, and nothing else; annotations are numbered from 1 on."""
    sizes = {image.image_id: list(image.size) for image in data.images}
    return {
        "images": [
            {"id": image_numbers[key], "file_name": "", "height": size[0], "width": size[1]}
            for key, size in sizes.items()
        ],
        "categories": [
            {"id": category_numbers[key], "name": name} for key, name in data.categories
        ],
        "annotations": [
            {
                "id": number,
                "image_id": image_numbers[one.image_id],
                "category_id": category_numbers[one.category_id],
                "bbox": list(one.box),
                "area": one.area,
                "iscrowd": int(one.is_crowd),
                "segmentation": {"size": sizes[one.image_id], "counts": one.mask},
            }
            for number, one in enumerate(data.objects, start=1)
        ],
    }


def versions() -> dict[str, str]:
    """The versions of the packages that compute the figures."""
    packages = {name: metadata.version(name) for name in ("hotcoco", "numpy")}
    return {"vitadapter-zoo": __version__, **packages}


def _summarize(precision: Floats, recall: Floats, names: list[str]) -> Scores:
    """COCO's 12 figures, as pycocotools computes them, and AP by class."""
    last = len(MAX_DETECTIONS) - 1
    half, three_quarters = 0, 5  # places of IoU 0.50 and 0.75
    values = [
        _mean(precision[:, :, :, ALL, last]),
        _mean(precision[half, :, :, ALL, last]),
        _mean(precision[three_quarters, :, :, ALL, last]),
        *(_mean(precision[:, :, :, area, last]) for area in (SMALL, MEDIUM, LARGE)),
        *(_mean(recall[:, :, ALL, place]) for place in range(last + 1)),
        *(_mean(recall[:, :, area, last]) for area in (SMALL, MEDIUM, LARGE)),
    ]
    return Scores(
        figures=dict(zip(FIGURES, values, strict=True)),
        per_class={n: _mean(precision[:, :, k, ALL, last]) for k, n in enumerate(names)},
        per_class_50={n: _mean(precision[half, :, k, ALL, last]) for k, n in enumerate(names)},
        precision=precision,
    )


def _mean(values: Floats) -> float:
    measured = values[values > NOTHING]
    return float(measured.mean()) if measured.size else NOTHING


def _matches(entries: list[dict[str, Any]], places: dict[int, int]) -> Matches:
    """The matches of a class: hotcoco's entries for the images, concatenated."""
    empty = np.zeros((10, 0), np.bool_)
    scores = np.concatenate([np.zeros(0), *(np.array(one["dtScores"]) for one in entries)])
    found, ignored = (
        np.concatenate(
            [empty, *(np.array(one[name], np.bool_).reshape(10, -1) for one in entries)], axis=1
        )
        for name in ("dtMatched", "dtIgnore")
    )
    images = [places[one["image_id"]] for one in entries]
    objects = np.zeros(len(places))
    for place, one in zip(images, entries, strict=True):
        objects[place] = one["gtIgnore"].count(False)
    order = np.argsort(-scores, kind="stable")
    by_detection = np.repeat(np.array(images, np.int64), [len(one["dtScores"]) for one in entries])
    return Matches(
        images=by_detection[order],
        found=(found & ~ignored)[:, order],
        counted=~ignored[:, order],
        objects=objects,
    )
