"""Reports of a verification: a table for the terminal, JSON, and a page for people."""

from __future__ import annotations

import math
from typing import Any

from vitadapter_zoo.scoring import FIGURES, NOTHING, Scores
from vitadapter_zoo.verdict import Comparison, Verification

COLORS = {"confirmed": "green", "refuted": "red", "inconclusive": "yellow"}


def record(found: Verification) -> dict[str, Any]:
    """Every figure of a verification at full precision, ready for JSON."""
    return {
        "model": found.model,
        "verdict": found.verdict,
        "reason": found.reason,
        "comparisons": {one.kind: _comparison(one) for one in found.comparisons},
        "box": _scores(found.box),
        "mask": _scores(found.mask),
        "images": {
            "evaluated": found.evaluated,
            "total": found.total,
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


def print_table(found: Verification) -> None:
    """Print published, measured, difference and verdict."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(title=escape(found.model))
    table.add_column("AP")
    for name in ("published", "measured", "difference"):
        table.add_column(name, justify="right")
    if found.comparisons[0].interval is not None:
        table.add_column(f"{found.comparisons[0].interval.level:.0%} interval, whole set")
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
    console.print(table)
    color = COLORS[found.verdict]
    console.print(f"[{color}]{found.verdict}[/{color}]: {escape(found.reason)}", soft_wrap=True)
    if found.comparisons[0].interval is not None:
        console.print(
            "The AP of a part is not set beside the published value: it is biased, by chance and "
            "by the classes that do not occur in it"
            + (f" ({len(found.unseen)} here)." if found.unseen else "."),
            soft_wrap=True,
        )
