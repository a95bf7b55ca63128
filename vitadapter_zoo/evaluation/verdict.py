"""What figures say of a checkpoint: confirmed, refuted, or not enough to tell."""

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

TOLERANCE = 0.1  # AP points between the published and the measured value, both rounded to 0.1
SHOWN_LEVEL = 0.95  # of the interval that is reported
REFUTING_LEVEL = 0.99  # of the interval outside of which a part refutes
FEWEST_TO_REFUTE = 50  # images: the interval of fewer, with few ways to halve them, is too narrow


@dataclass(frozen=True)
class Comparison:
    """One AP beside the published one, in points (0..100).

    Attributes:
        kind: box or mask.
        published: as printed, to 0.1; None where there is none for these data.
        measured: on the images evaluated, -1 where nothing is annotated.
        interval: of the whole data set's AP (0..1), where a random part was evaluated.
        refuting: the wider one, which a published value must leave to be refuted by a part.
    """

    kind: Kind
    published: float | None
    measured: float
    interval: Interval | None = None
    refuting: Interval | None = None

    @property
    def difference(self) -> float | None:
        """Measured minus published, both to 0.1; None without a published value."""
        if self.published is None:
            return None
        return round(round(self.measured, 1) - self.published, 1)


@dataclass(frozen=True)
class Verification:
    """What an evaluation found; ``verify`` and ``judge`` make it.

    Attributes:
        model: load name, folder or file that was evaluated.
        verdict: confirmed, refuted or inconclusive.
        reason: one sentence.
        comparisons: box, then mask.
        box: COCO's figures for boxes.
        mask: COCO's figures for masks.
        results: one per evaluated image, in the order of image ids; left-out ones are not here.
        skipped: the images left out, with the reason.
        total: images of the whole data set.
        unseen: names of the classes annotated in the whole data set and in no evaluated image.
        data: what was evaluated on.
        images: folder of the image files; None where results came from a file.
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
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def annotations(self) -> Path:
        """The annotation file."""
        return self.data.annotations

    @property
    def evaluated(self) -> int:
        """How many images were evaluated."""
        return len(self.results)


def judge(
    model: str,
    data: Dataset,
    results: Sequence[ImageResult],
    published: tuple[float, float] | None,
    *,
    random_part: bool = False,
    seed: int = 0,
    images: Path | None = None,
    details: dict[str, Any] | None = None,
) -> Verification:
    """Score results and compare them with the published box and mask AP.

    Confirmed are values that round to within 0.1 of the published ones over the whole data set.
    A random part never confirms; one of 50 images or more refutes where a published value lies
    outside the 99% interval of the whole set's AP by more than that tolerance, whatever AP the
    classes had that do not occur in the part.

    Args:
        model: what is judged, for the report.
        data: what it was evaluated on.
        results: one per image.
        published: box and mask AP in points (0..100), for the whole of ``data``; None where
            nothing is known.
        random_part: whether the images are a random sample of the data set.
        seed: of the bootstrap.
        images: folder of the image files.
        details: of the run, for the report.
    """
    scored = sorted(
        (one for one in results if not one.skipped), key=lambda one: ids.order(one.image_id)
    )
    skipped = {one.image_id: one.skipped for one in results if one.skipped}
    annotations = Annotations(data)
    table = annotations.tabulate(scored)
    seen = {one.image_id for one in scored}
    names = dict(data.categories)
    annotated: set[Id] = set()
    present: set[Id] = set()
    for image in data.images:
        annotated |= image.category_ids
        if image.image_id in seen:
            present |= image.category_ids
    unseen = tuple(name for key, name in names.items() if key in annotated - present)
    estimate_whole = random_part and present and len(scored) < len(data.images)
    values = published or (None, None)
    scores: list[Scores] = []
    comparisons = []
    for kind, value in zip(KINDS, values, strict=True):
        of_kind = annotations.score(table, kind)
        scores.append(of_kind)
        intervals: list[Interval | None] = [None, None]
        if estimate_whole:
            matches = annotations.matches(table, kind)
            levels = (SHOWN_LEVEL, REFUTING_LEVEL)
            intervals = list(bootstrap(matches, len(data.images), levels, seed=seed))
        measured = 100 * of_kind.ap if of_kind.ap != NOTHING else NOTHING
        comparisons.append(Comparison(kind, value, measured, *intervals))
    both = (comparisons[0], comparisons[1])
    complete = len(scored) == len(data.images)
    share_unseen = len(unseen) / max(1, len(annotated))
    verdict, reason = _decide(both, complete, len(scored), len(data.images), skipped, share_unseen)
    return Verification(
        model=model,
        verdict=verdict,
        reason=reason,
        comparisons=both,
        box=scores[0],
        mask=scores[1],
        results=tuple(scored),
        skipped=skipped,
        total=len(data.images),
        unseen=unseen,
        data=data,
        images=images,
        details=details or {},
    )


def _decide(
    comparisons: tuple[Comparison, Comparison],
    complete: bool,
    evaluated: int,
    total: int,
    skipped: dict[Id, str],
    unseen: float,
) -> tuple[Verdict, str]:
    if any(one.published is None for one in comparisons):
        return "inconclusive", (
            "no published values belong to these data: the tables' are for the whole of COCO "
            "val2017"
        )
    if complete:
        apart = [one for one in comparisons if abs(one.difference or 0) > TOLERANCE + 1e-9]
        if apart:
            differences = " and ".join(f"{one.kind} AP by {one.difference:+.1f}" for one in apart)
            return "refuted", f"on all {total:,} images, {differences}"
        return "confirmed", f"on all {total:,} images, both within {TOLERANCE} of the published"
    for one in comparisons:
        if evaluated >= FEWEST_TO_REFUTE and _is_outside(one, unseen):
            return "refuted", (
                f"on {evaluated:,} of {total:,} images: the published {one.kind} AP lies outside "
                f"the {REFUTING_LEVEL:.0%} interval of the whole set's"
            )
    left_out = f", {len(skipped):,} of them bad" if skipped else ""
    return "inconclusive", (
        f"{total - evaluated:,} of {total:,} images were not evaluated{left_out}; the published "
        "values are for all"
    )


def _is_outside(comparison: Comparison, unseen: float) -> bool:
    """Whether the published value cannot be, even if every unseen class had AP 0, or 1."""
    if comparison.refuting is None or comparison.published is None:
        return False
    slack = TOLERANCE + 0.05  # and half of the digit that is printed
    low = 100 * comparison.refuting.low * (1 - unseen) - slack
    high = 100 * (comparison.refuting.high * (1 - unseen) + unseen) + slack
    return not low <= comparison.published <= high
