"""COCO's figures for a set of results, computed by hotcoco behind one function.

hotcoco has pycocotools' interface and gives its figures to the last digit; faster-coco-eval, which
has the same interface, could take its place here and nowhere else.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from vitadapter_zoo._version import __version__
from vitadapter_zoo.evaluation.run import ImageResult

Kind = Literal["box", "mask"]
KINDS: tuple[Kind, Kind] = ("box", "mask")
Floats = npt.NDArray[np.float64]

_IOU_TYPES = {"box": "bbox", "mask": "segm"}
ALL, SMALL, MEDIUM, LARGE = range(4)  # COCO's area ranges: split at 32 x 32 and 96 x 96 pixels
MAX_DETECTIONS = (1, 10, 100)
NOTHING = -1.0  # COCO's figure where there is nothing to measure
FIGURES = (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
)  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """COCO's figures of one kind, box or mask; all in 0..1, and -1 where nothing is annotated.

    Attributes:
        figures: the 12 of COCO by the names in ``FIGURES``.
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
    """Which detections of one class found an object, best score first.

    Attributes:
        images: int64 ``[D]``, place of each detection's image among the images asked for.
        found: bool ``[10, D]``: matched with an object, by IoU threshold.
        counted: bool ``[10, D]``: neither matched with a crowd nor otherwise left out.
        objects: float64 ``[I]``: objects of the class in each image, crowds left out.
    """

    images: npt.NDArray[np.int64]
    found: npt.NDArray[np.bool_]
    counted: npt.NDArray[np.bool_]
    objects: Floats


@dataclass(frozen=True)
class Table:
    """Results of several images in one table, for both kinds; ``tabulate`` makes it.

    Attributes:
        image_ids: of every image, in order, those without detections too.
        rows: float64 ``[D, 7]``: image id, x, y, width, height, score, category id.
        masks: COCO's RLE of each row.
    """

    image_ids: list[int]
    rows: Floats
    masks: list[Any]


def tabulate(results: Sequence[ImageResult]) -> Table:
    """One table of all detections, ordered by image id, which decides between equal scores."""
    ordered = sorted(results, key=lambda result: result.image_id)
    rows = np.empty((sum(len(result.scores) for result in ordered), 7))
    masks: list[Any] = []
    start = 0
    with _without_collection():
        for result in ordered:
            block = rows[start : start + len(result.scores)]
            if len(block):
                block[:, 0] = result.image_id
                block[:, 1:5] = result.boxes
                block[:, 5] = result.scores
                block[:, 6] = result.category_ids
                masks += result.segmentations()
            start += len(block)
    return Table([result.image_id for result in ordered], rows, masks)


@dataclass(frozen=True)
class Unmatched:
    """What does not fit in one image, at IoU 0.5; crowds are left out.

    Attributes:
        missed: ids of the annotations that no detection of their class found.
        false: places, in the image's result, of the detections that found no object.
    """

    missed: tuple[int, ...]
    false: tuple[int, ...]


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """For half a million dictionaries at once: looking for garbage takes longer than that."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()


class Annotations:
    """An annotation file as hotcoco holds it, read once for both kinds."""

    def __init__(self, path: Path) -> None:
        from hotcoco import COCO

        self._coco = COCO(str(path))
        names = self._coco.cats
        self.category_ids = sorted(names)
        self.category_names = [str(names[key]["name"]) for key in self.category_ids]

    def score(self, table: Table, kind: Kind) -> Scores:
        """COCO's figures over the images of the table.

        Args:
            table: from ``tabulate``.
            kind: what is compared, boxes or masks.
        """
        evaluation = self._evaluate(table, kind)
        evaluation.accumulate()
        curves = evaluation.eval
        return _summarize(curves["precision"], curves["recall"], self.category_names)

    def matches(self, table: Table, kind: Kind) -> list[Matches]:
        """The matching behind the AP over all areas, class by class, for resampling images.

        Args:
            table: from ``tabulate``; the matches number its images in their order.
            kind: what is compared, boxes or masks.
        """
        evaluation = self._evaluate(table, kind, every_area=False)
        places = {image_id: place for place, image_id in enumerate(table.image_ids)}
        by_class: dict[int, list[dict[str, Any]]] = {key: [] for key in self.category_ids}
        for entry in evaluation.eval_imgs:
            if entry is not None:
                by_class[entry["category_id"]].append(entry)
        return [_matches(by_class[key], places) for key in self.category_ids]

    def unmatched(self, results: Sequence[ImageResult], kind: Kind) -> list[Unmatched]:
        """Missed objects and false detections of each image, by COCO's matching at IoU 0.5.

        Args:
            results: one per image, with the detections that shall count.
            kind: what is compared, boxes or masks.

        Returns:
            One for each of ``results``, in their order.
        """
        found = self._evaluate(tabulate(results), kind, every_area=False)
        found = found.image_diagnostics(iou_thr=0.5)
        missed: dict[int, list[int]] = {result.image_id: [] for result in results}
        unfound = [key for key, status in found["gt_status"].items() if status == "fn"]
        for one in self._coco.load_anns(unfound):
            missed[one["image_id"]].append(one["id"])
        false: dict[int, list[int]] = {}
        first = 1  # hotcoco numbers the detections in the order of the images
        for result in sorted(results, key=lambda one: one.image_id):
            places = range(len(result.scores))
            statuses = [found["dt_status"].get(first + place) for place in places]
            false[result.image_id] = [place for place in places if statuses[place] == "fp"]
            first += len(places)
        return [
            Unmatched(tuple(sorted(missed[result.image_id])), tuple(false[result.image_id]))
            for result in results
        ]

    def objects(self, image_id: int) -> list[dict[str, Any]]:
        """The annotations of one image, each with its mask as ``rle``."""
        found = self._coco.load_anns(self._coco.get_ann_ids(img_ids=[image_id]))
        return [{**one, "rle": self._coco.ann_to_rle(one)} for one in found]

    def file_name(self, image_id: int) -> str:
        """Path of an image's file inside the folder of images."""
        return str(self._coco.load_imgs([image_id])[0]["file_name"])

    def _evaluate(self, table: Table, kind: Kind, *, every_area: bool = True) -> Any:
        from hotcoco import COCOeval

        if kind == "box":
            detections = self._coco.load_res(table.rows)
        else:
            detections = self._coco.load_res(table.rows, segmentation=table.masks)
            if table.masks:  # by size a mask counts with its own area, not with its box's
                from hotcoco import mask

                areas = np.asarray(mask.area(table.masks), np.float64)
                detections.update_anns(ids=np.arange(1, len(areas) + 1), area=areas)
        evaluation = COCOeval(self._coco, detections, _IOU_TYPES[kind])
        evaluation.params.img_ids = table.image_ids
        if not every_area:
            evaluation.params.area_rng = evaluation.params.area_rng[:1]
            evaluation.params.area_rng_lbl = evaluation.params.area_rng_lbl[:1]
        evaluation.evaluate()
        return evaluation


def versions() -> dict[str, str]:
    """The versions of what scores."""
    packages = {name: metadata.version(name) for name in ("hotcoco", "numpy")}
    return {"vitadapter-zoo": __version__, **packages}


def _summarize(precision: Floats, recall: Floats, names: list[str]) -> Scores:
    """The 12 means of COCO, as pycocotools takes them, and those by class."""
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
    """One class's entries of hotcoco, put together over the images."""
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
