"""The verdict on a checkpoint from its figures: confirmed, refuted or inconclusive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vitadapter_zoo.evaluation import ids
from vitadapter_zoo.evaluation.bootstrap import Interval, bootstrap
from vitadapter_zoo.evaluation.dataset import Dataset
from vitadapter_zoo.evaluation.ids import Id
from vitadapter_zoo.evaluation.run import ImageResult
from vitadapter_zoo.evaluation.scoring import KINDS, NOTHING, Annotations, Kind, Scores

Verdict = Literal["confirmed", "refuted", "inconclusive"]
Reference = Literal["published", "expected"]

TOLERANCE = 0.1  # AP points between the published and the measured value, both rounded to 0.1
SHOWN_LEVEL = 0.95  # of the interval that is reported
REFUTING_LEVEL = 0.99  # of the interval; a part refutes values outside of it
FEWEST_TO_REFUTE = (
    50  # images; fewer can be halved in few ways, which makes the interval too narrow
)


@dataclass(frozen=True)
class Comparison:
    """A measured AP and the published or expected one, in points (0..100).

    Attributes:
        kind: box or mask.
        published: the published or expected value, to 0.1; None if there is none for these data.
        measured: on the images evaluated, -1 where nothing is annotated.
        interval: of the whole data set's AP (0..1), if a random part was evaluated.
        refuting: the wider interval; a part refutes values outside of it.
    """

    kind: Kind
    published: float | None
    measured: float
    interval: Interval | None = None
    refuting: Interval | None = None

    @property
    def difference(self) -> float | None:
        """Measured minus published, both to 0.1; None if one of them is missing."""
        if self.published is None or self.measured == NOTHING:
            return None
        return round(round(self.measured, 1) - self.published, 1)


@dataclass(frozen=True)
class Verification:
    """The outcome of an evaluation; ``verify`` and ``judge`` return it.

    Attributes:
        model: load name, folder or repository that was evaluated.
        verdict: confirmed, refuted or inconclusive.
        reason: one sentence.
        comparisons: box, then mask.
        box: COCO's figures for boxes.
        mask: COCO's figures for masks.
        results: one per evaluated image, in the order of the image ids.
        skipped: the reasons why images were left out, by image id.
        total: number of images in the whole data set.
        unseen: names of the classes that are annotated in the data set but in no evaluated image.
        data: the data set.
        images: folder of the image files; None if results came from a file and no folder is known.
        reference: whether the values to compare with are published, or the caller's own.
        details: hashes, precision, versions, hardware and duration, ready for JSON.
    """

    model: str
    verdict: Verdict
    reason: str
    comparisons: tuple[Comparison, Comparison]
    box: Scores
    mask: Scores
    results: tuple[ImageResult, ...]
    skipped: dict[Id, str]
    total: int
    unseen: tuple[str, ...]
    data: Dataset
    images: Path | None
    reference: Reference = "published"
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def annotations(self) -> Path:
        """The annotation file."""
        return self.data.annotations

    @property
    def evaluated(self) -> int:
        """The number of evaluated images."""
        return len(self.results)


def judge(
    model: str,
    data: Dataset,
    results: Sequence[ImageResult],
    published: tuple[float, float] | None,
    *,
    reference: Reference = "published",
    random_part: bool = False,
    seed: int = 0,
    images: Path | None = None,
    details: dict[str, Any] | None = None,
) -> Verification:
    """Score results and compare them with the published box and mask AP.

    Values that round to within 0.1 of the published ones over the whole data set confirm them. A
    random part never confirms. A part of 50 images or more refutes if a published value lies
    outside the 99% interval of the whole set's AP by more than that tolerance, whatever AP the
    classes have that do not occur in the part.

    Args:
        model: name of the model, for the report.
        data: the data set.
        results: one per image.
        published: box and mask AP in points (0..100), for the whole of ``data``; None if they are
            not known.
        reference: what ``published`` is called: published, or expected by the caller.
        random_part: whether the images are a random sample of the data set.
        seed: of the bootstrap.
        images: folder of the image files.
        details: of the run, for the report.
    """
    scored = sorted(
        (one for one in results if not one.skipped), key=lambda one: ids.order(one.image_id)
    )
    skipped = {one.image_id: one.skipped for one in results if one.skipped}
    annotated, unseen = _annotated_and_unseen(data, scored)
    estimate_whole = random_part and len(unseen) < annotated and len(scored) < len(data.images)
    box, mask, comparisons = _compare(data, scored, published, estimate_whole, seed)
    coverage = _Coverage(
        len(scored), len(data.images), len(skipped), len(unseen) / max(1, annotated)
    )
    verdict, reason = _decide(comparisons, coverage, reference)
    return Verification(
        model=model,
        verdict=verdict,
        reason=reason,
        comparisons=comparisons,
        box=box,
        mask=mask,
        results=tuple(scored),
        skipped=skipped,
        total=len(data.images),
        unseen=unseen,
        data=data,
        images=images,
        reference=reference,
        details=details or {},
    )


def _annotated_and_unseen(
    data: Dataset, scored: Sequence[ImageResult]
) -> tuple[int, tuple[str, ...]]:
    """Count the classes with objects, and name those that no evaluated image shows."""
    seen = {one.image_id for one in scored}
    annotated: set[Id] = set()
    present: set[Id] = set()
    for image in data.images:
        annotated |= image.category_ids
        if image.image_id in seen:
            present |= image.category_ids
    unseen = tuple(name for key, name in data.categories if key in annotated - present)
    return len(annotated), unseen


def _compare(
    data: Dataset,
    scored: Sequence[ImageResult],
    published: tuple[float, float] | None,
    estimate_whole: bool,
    seed: int,
) -> tuple[Scores, Scores, tuple[Comparison, Comparison]]:
    """Compute the figures of both kinds, and compare each AP with its published value."""
    annotations = Annotations(data)
    table = annotations.tabulate(scored)
    scores: list[Scores] = []
    comparisons = []
    for kind, value in zip(KINDS, published or (None, None), strict=True):
        of_kind = annotations.score(table, kind)
        scores.append(of_kind)
        intervals: list[Interval | None] = [None, None]
        if estimate_whole:
            matches = annotations.matches(table, kind)
            levels = (SHOWN_LEVEL, REFUTING_LEVEL)
            intervals = list(bootstrap(matches, len(data.images), levels, seed=seed))
        measured = 100 * of_kind.ap if of_kind.ap != NOTHING else NOTHING
        comparisons.append(Comparison(kind, value, measured, *intervals))
    return scores[0], scores[1], (comparisons[0], comparisons[1])


@dataclass(frozen=True)
class _Coverage:
    """How many images were evaluated, exist and were left out; the share of unseen classes."""

    evaluated: int
    total: int
    skipped: int
    unseen: float

    @property
    def is_complete(self) -> bool:
        return self.evaluated == self.total


def _decide(
    comparisons: tuple[Comparison, Comparison], coverage: _Coverage, reference: Reference
) -> tuple[Verdict, str]:
    if any(one.published is None for one in comparisons):
        return "inconclusive", (
            "no published values belong to this data: they are for all of COCO val2017; "
            "--expect BOX MASK compares with values of your own"
        )
    if any(one.measured == NOTHING for one in comparisons):
        return "inconclusive", "the evaluated images have no annotated objects"
    total = coverage.total
    if coverage.is_complete:
        apart = [one for one in comparisons if abs(one.difference or 0) > TOLERANCE + 1e-9]
        if apart:
            return "refuted", f"on all {total:,} images, {_differences(apart, reference)}"
        return "confirmed", (
            f"on all {total:,} images, both are within {TOLERANCE} of the {reference} values"
        )
    for one in comparisons:
        if coverage.evaluated >= FEWEST_TO_REFUTE and _is_outside(one, coverage.unseen):
            return "refuted", (
                f"on {coverage.evaluated:,} of {total:,} images, the {reference} {one.kind} AP "
                f"lies outside the {REFUTING_LEVEL:.0%} interval of the whole set's"
            )
    left_out = f", {coverage.skipped:,} of them bad" if coverage.skipped else ""
    return "inconclusive", (
        f"{total - coverage.evaluated:,} of {total:,} images were not evaluated{left_out}; the "
        f"{reference} values are for all"
    )


def _differences(apart: Sequence[Comparison], reference: Reference) -> str:
    """``box AP is 41.0 below the expected 71.0 and mask AP is ...``."""
    parts = []
    for one in apart:
        difference = one.difference or 0.0
        side = "below" if difference < 0 else "above"
        parts.append(
            f"{one.kind} AP is {abs(difference):.1f} {side} the {reference} {one.published:.1f}"
        )
    return " and ".join(parts)


def _is_outside(comparison: Comparison, unseen: float) -> bool:
    """Whether the published value is impossible, even if every unseen class had AP 0, or 1."""
    if comparison.refuting is None or comparison.published is None:
        return False
    slack = TOLERANCE + 0.05  # and half of the digit that is printed
    low = 100 * comparison.refuting.low * (1 - unseen) - slack
    high = 100 * (comparison.refuting.high * (1 - unseen) + unseen) + slack
    return not low <= comparison.published <= high
