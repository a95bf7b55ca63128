"""Bootstrap intervals: the AP of a whole data set, estimated from a random part of it.

AP is not a mean over images. On a part it is biased upwards, because interpolated precision takes a
maximum, which profits from chance; and classes that do not occur in the part do not count. This
module therefore resamples halves of the images without replacement (the repeated half-sample
bootstrap: Saigo, Shao and Sitter, Survey Methodology 27, 2001). Drawing with replacement would make
classes with few images look too certain. The distance of the halves above the part estimates the
distance of the part above the whole. The interval is the basic (reflected) bootstrap interval
around the corrected value (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters
10 and 13). Bias and interval shrink with the share of images that were not evaluated (Cochran,
Sampling Techniques, 1977, section 2.6).

Objects are matched once; each replicate only changes the weights of the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vitadapter_zoo.evaluation.scoring import Floats, Matches

REPLICATES = 1000
RECALLS = np.linspace(0, 1, 101)  # COCO's recall thresholds
_CELLS = 20_000_000  # replicates x detections held at a time: 80 MB


@dataclass(frozen=True)
class Interval:
    """An interval for the AP of the whole data set, from a part of it; all values in 0..1.

    Attributes:
        estimate: the part's AP, corrected for its bias.
        low: lower end.
        high: upper end.
        level: 0.95 for a 95% interval.
    """

    estimate: float
    low: float
    high: float
    level: float


def average_precision(matches: Sequence[Matches], weights: Floats) -> Floats:
    """COCO's AP with each image counted as many times as its weight.

    Args:
        matches: of each class, over I images.
        weights: ``[B, I]``, whole numbers from 0.

    Returns:
        float64 ``[B]``, 0..1; NaN if no class has an object.
    """
    by_class = np.stack([_class_ap(one, weights) for one in matches])
    measured = ~np.isnan(by_class)
    count = measured.sum(axis=0)
    return np.where(
        count > 0, np.where(measured, by_class, 0).sum(axis=0) / np.maximum(count, 1), np.nan
    )


def _class_ap(matches: Matches, weights: Floats) -> Floats:
    objects = weights @ matches.objects
    result = np.full(len(weights), np.nan)
    step = max(1, _CELLS // max(1, len(matches.images)))
    for start in range(0, len(weights), step):
        rows = slice(start, start + step)
        present = objects[rows] > 0
        if present.any():
            chosen = weights[rows][present]
            values = np.full(len(present), np.nan)
            values[present] = _present_class_ap(matches, chosen, objects[rows][present])
            result[rows] = values
    return result


def _present_class_ap(matches: Matches, weights: Floats, objects: Floats) -> Floats:
    """AP of a class for weights that leave it objects; recall rises only at matched detections."""
    by_detection = weights[:, matches.images].astype(np.float32)
    total = np.zeros(len(weights))
    seen, places = np.zeros(0), np.zeros(0, np.bool_)
    for found, counted in zip(matches.found, matches.counted, strict=True):
        if not np.array_equal(counted, places):
            seen, places = np.cumsum(by_detection * counted, axis=1, dtype=np.float32), counted
        hits = np.flatnonzero(found)
        if not len(hits):
            continue
        true = np.cumsum(by_detection[:, hits], axis=1, dtype=np.float32).astype(np.float64)
        precision = true / np.maximum(seen[:, hits], 1)
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        reached = np.searchsorted(RECALLS, true / objects[:, None], side="right")
        steps = np.diff(reached, axis=1, prepend=0)
        total += (precision * steps).sum(axis=1) / len(RECALLS)
    return total / len(matches.found)


def bootstrap(
    matches: Sequence[Matches],
    whole: int,
    levels: Sequence[float],
    *,
    seed: int = 0,
    replicates: int = REPLICATES,
) -> list[Interval]:
    """Intervals for the AP of the whole data set, from a random part of it.

    They cover only the classes that occur in the part.

    Args:
        matches: of each class, over the images of the part.
        whole: images of the whole data set.
        levels: 0.95 for a 95% interval.
        seed: of the resampling.
        replicates: number of resamplings.

    Raises:
        ValueError: no object is annotated in the part.
    """
    part = len(matches[0].objects)
    left = max(0.0, 1 - part / whole)
    measured = float(average_precision(matches, np.ones((1, part)))[0])
    if np.isnan(measured):
        raise ValueError("no object is annotated in this part of the data set")
    half = max(1, part // 2)
    order = np.random.default_rng(seed).random((replicates, part)).argsort(axis=1)
    values = average_precision(matches, (order < half).astype(np.float64))
    values = values[~np.isnan(values)]
    # A half varies around the part as the part varies around an infinite whole, if the part has an
    # even number of images; an odd image is corrected for.
    ratio = left * half / max(1, part - half)
    estimate = measured - ratio * float(values.mean() - measured)
    spread = (values - values.mean()) * np.sqrt(ratio)
    intervals = []
    for level in levels:
        # The k-th of R values estimates the quantile k / (R + 1); k / R makes intervals from few
        # replicates too narrow.
        tails = [(1 - level) / 2, (1 + level) / 2]
        low, high = np.quantile(spread, tails, method="weibull")
        intervals.append(Interval(estimate, estimate - float(high), estimate - float(low), level))
    return intervals
