"""Reports of a verification: tables for the terminal, JSON, and an HTML page."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitadapter_zoo import settings
from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.evaluation.scoring import ALL, FIGURES, MEANINGS, NOTHING, Scores
from vitadapter_zoo.evaluation.verdict import Comparison, Verification
from vitadapter_zoo.text import shown
from vitadapter_zoo.weights import atomic, cache

if TYPE_CHECKING:
    from rich.table import Table

PAGE, FIGURES_FILE, DETECTIONS = "report.html", "report.json", "detections.json"
BINS = 20  # of the score histogram, over 0..1

COLORS = {"confirmed": "green", "refuted": "red", "inconclusive": "yellow"}


def record(found: Verification) -> dict[str, Any]:
    """Every figure of a verification at full precision, ready for JSON."""
    return {
        "model": found.model,
        "verdict": found.verdict,
        "reason": found.reason,
        "reference": found.reference,
        "comparisons": {one.kind: _comparison(one) for one in found.comparisons},
        "box": _scores(found.box),
        "mask": _scores(found.mask),
        "images": {
            "evaluated": found.evaluated,
            "total": found.total,
            "detections": sum(len(one.scores) for one in found.results),
            "skipped": {str(key): reason for key, reason in found.skipped.items()},
            "unseen_classes": list(found.unseen),
        },
        "annotations": str(found.annotations),
        **found.details,
    }


def _comparison(one: Comparison) -> dict[str, Any]:
    def ends(interval: Any) -> dict[str, float] | None:
        if interval is None:
            return None
        return {
            "estimate": 100 * interval.estimate,
            "low": 100 * interval.low,
            "high": 100 * interval.high,
            "level": interval.level,
        }

    return {
        "published": one.published,
        "measured": one.measured,
        "difference": one.difference,
        "interval": ends(one.interval),
        "refuting_interval": ends(one.refuting),
    }


def _scores(scores: Scores) -> dict[str, Any]:
    return {
        "figures": {name: scores.figures[name] for name in FIGURES},
        "per_class": scores.per_class,
        "per_class_50": scores.per_class_50,
    }


def check_folder(directory: Path, inputs: Sequence[Any] = ()) -> None:
    """Refuse a folder that no report can be written to, before the evaluation starts.

    Args:
        directory: of the report.
        inputs: what the evaluation reads; those that are paths are never replaced.

    Raises:
        ZooError: it cannot be created or written to, or a file of the report is an input.
    """
    from vitadapter_zoo.detections.output_files import refuse_inputs

    refuse_inputs([directory / name for name in (PAGE, FIGURES_FILE, DETECTIONS)], inputs)
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ZooError(
            f"no report can be written to {directory}: {there} is not a folder with write "
            "permission; choose another one with --report"
        )


def write(
    found: Verification, directory: str | os.PathLike[str], *, command: str | None = None
) -> dict[str, Any]:
    """Write report.json, report.html and detections.json; each file is replaced in one step.

    Args:
        found: the outcome of the evaluation.
        directory: created if it does not exist.
        command: the command line, for the report.

    Returns:
        The content of report.json.

    Raises:
        ZooError: the folder cannot be written to, or a file of the report is an input.
    """
    directory = settings.expanded(directory)
    check_folder(directory, [found.annotations, found.details.get("results")])
    from vitadapter_zoo.reports import page
    from vitadapter_zoo.reports.worst_images import worst

    folder = settings.expanded(directory)
    examples = worst(found)
    content = {
        **record(found),
        "command": command,
        "date": atomic.now(),
        "curves": {"box": curves(found.box), "mask": curves(found.mask)},
        "score_histogram": score_histogram(found),
        "worst_images": [asdict(mistakes) for mistakes, _ in examples],
    }
    with cache.locked(settings.home(), f"report-{cache.digest(str(folder.resolve()))}"):
        _write_detections(found, folder / DETECTIONS)
        atomic.write_json(folder / FIGURES_FILE, content)
        atomic.write_text(folder / PAGE, page.report(content, [shown for _, shown in examples]))
    return content


def _write_detections(found: Verification, target: Path) -> None:
    """Write COCO's result format with a line for each detection, without building it in memory."""
    with atomic.replacing(target) as partial, partial.open("w", encoding="utf-8") as file:
        separator = "[\n"
        for result in found.results:
            for detection in result.to_coco():
                file.write(separator + json.dumps(detection))
                separator = ",\n"
        file.write("[]\n" if separator == "[\n" else "\n]\n")


def curves(scores: Scores) -> dict[str, list[float]]:
    """Precision at recall 0:0.01:1 by IoU, the mean over the annotated classes; empty without any.

    The IoU is 0.50, 0.75, or the mean over 0.50:0.05:0.95. The mean of each curve is the AP.
    """
    of_all = scores.precision[:, :, :, ALL, -1]
    annotated = of_all[:, :, (of_all > NOTHING).all(axis=(0, 1))]
    if not annotated.size:
        return {"0.50": [], "0.75": [], "0.50:0.95": []}
    by_threshold = annotated.mean(axis=2)
    return {
        "0.50": by_threshold[0].tolist(),
        "0.75": by_threshold[5].tolist(),
        "0.50:0.95": by_threshold.mean(axis=0).tolist(),
    }


def score_histogram(found: Verification) -> list[int]:
    """The number of detections with a score in each twentieth of 0..1."""
    scores = np.concatenate([np.zeros(0), *(np.asarray(one.scores) for one in found.results)])
    counts: list[int] = np.histogram(scores, bins=BINS, range=(0, 1))[0].tolist()
    return counts


def print_table(found: Verification) -> None:
    """Print the comparison, the 12 figures of box and mask, and the verdict."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    console.print(_comparison_table(found))
    console.print(_figure_table(found))
    before = found.details.get("images_before", 0)
    if before:
        console.print(f"{before:,} images were evaluated in an earlier call.")
    color = COLORS[found.verdict]
    console.print(f"[{color}]{found.verdict}[/{color}]: {escape(found.reason)}", soft_wrap=True)
    if found.comparisons[0].interval is not None:
        console.print(
            f"The AP of a part cannot be compared with the {found.reference} value: it is biased, "
            "by chance and by the classes that do not occur in the part"
            + (f" ({len(found.unseen)} here)." if found.unseen else "."),
            soft_wrap=True,
        )


def _comparison_table(found: Verification) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(shown(found.model)))
    table.add_column("AP")
    for name in (found.reference, "measured", "difference"):
        table.add_column(name, justify="right")
    interval = found.comparisons[0].interval
    if interval is not None:
        table.add_column(f"{interval.level:.0%} interval, whole set")
    for one in found.comparisons:
        cells = [
            one.kind,
            "-" if one.published is None else f"{one.published:.1f}",
            "-" if one.measured == NOTHING or math.isnan(one.measured) else f"{one.measured:.2f}",
            "-" if one.difference is None else f"{one.difference:+.1f}",
        ]
        if one.interval is not None:
            cells.append(f"{100 * one.interval.low:.1f} to {100 * one.interval.high:.1f}")
        table.add_row(*cells)
    return table


def _figure_table(found: Verification) -> Table:
    """COCO's 12 figures in points; "-" where nothing is annotated."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("", "box", "mask"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    table.add_column("")
    for name in FIGURES:
        values = (scores.figures[name] for scores in (found.box, found.mask))
        cells = ["-" if value == NOTHING else f"{100 * value:.2f}" for value in values]
        table.add_row(name, *cells, MEANINGS[name])
    return table
