"""The HTML pages of reports: self-contained files without any external resource."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from vitadapter_zoo.catalog import PAPER
from vitadapter_zoo.evaluation.scoring import FIGURES, MEANINGS, NOTHING
from vitadapter_zoo.reports import charts
from vitadapter_zoo.reports.worst_images import SCORE, Pictures
from vitadapter_zoo.text import visible

SIZES = {"small": "APs", "medium": "APm", "large": "APl"}


def report(content: Mapping[str, Any], pictures: Sequence[Pictures | str]) -> str:
    """The page of one verification.

    Args:
        content: the content of report.json, from ``vitadapter_zoo.reports.write``.
        pictures: for each of its ``worst_images``, or the reason why there are none.
    """
    figures = {kind: content[kind]["figures"] for kind in ("box", "mask")}
    return _render(
        "report.html",
        found=content,
        is_part=content["images"]["evaluated"] < content["images"]["total"],
        figures=[(name, MEANINGS[name], [figures[k][name] for k in figures]) for name in FIGURES],
        curves={
            kind: charts.curves(
                {
                    f"IoU {iou}, AP {100 * sum(values) / len(values):.1f}": values
                    for iou, values in content["curves"][kind].items()
                    if values
                },
                "recall",
                "precision",
            )
            for kind in figures
        },
        sizes=charts.bars(
            {
                title: {kind: _points(figures[kind][name]) for kind in figures}
                for title, name in SIZES.items()
            }
        ),
        classes=_classes(content),
        histogram=charts.histogram(content["score_histogram"], "score", "detections"),
        worst=list(zip(content["worst_images"], map(_sources, pictures), strict=True)),
        worst_score=SCORE,
        facts=_facts(content),
    )


def index(content: Mapping[str, Any]) -> str:
    """The page of the whole zoo.

    Args:
        content: the content of index.json, from ``vitadapter_zoo.reports.overview``.
    """
    return _render("index.html", zoo=content)


def _render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vitadapter_zoo.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        # Names of classes, files and models are foreign; Markup is made here.
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["points"] = _points
    environment.globals["paper"] = PAPER
    return environment.get_template(template).render(**values)


def _points(figure: float) -> float | None:
    """A figure in points; None if no object is annotated."""
    return None if figure == NOTHING else 100 * figure


def _classes(content: Mapping[str, Any]) -> list[tuple[str, list[float]]]:
    """Box AP, box AP50, mask AP and mask AP50 (0..1) of each class, the best mask AP first."""
    tables = [
        content[kind][name] for kind in ("box", "mask") for name in ("per_class", "per_class_50")
    ]
    rows = [(name, [table[name] for table in tables]) for name in tables[0]]
    return sorted(rows, key=lambda row: (-row[1][2], -row[1][0], row[0]))


def _sources(shown: Pictures | str) -> str | list[Markup]:
    """Data URIs: annotations, detections."""
    if isinstance(shown, str):
        return shown
    return [
        Markup(f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}")  # noqa: S704
        for picture in (shown.annotations, shown.detections)
    ]


def _facts(content: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Everything that the figures depend on, by section; values that are not known are left out."""
    identity = content.get("identity", {})
    environment = content.get("environment", {})
    data = {
        "annotations": content["annotations"],
        "annotations sha256": content.get("annotations_sha256", identity.get("annotations_sha256")),
        "sha256 over the image files": content.get("images_sha256"),
        "results": content.get("results"),
        "results sha256": content.get("results_sha256"),
    }
    before = content.get("images_before")
    network = {
        "model": content["model"],
        "weights sha256 (names and values)": identity.get("weights_sha256"),
        "precision": identity.get("precision"),
        "resize": identity.get("resize"),
        "device": identity.get("device"),
        "deformable attention": identity.get("operator"),
        "run directory": content.get("run"),
        "seconds of this call": _rounded(content.get("seconds")),
        "images from earlier calls": None if before is None else f"{before:,}",
        "seed of the sample": content.get("sample_seed"),
        "date": content["date"],
    }
    machine = {
        name: ", ".join(value) if isinstance(value, list) else value
        for name, value in environment.get("machine", {}).items()
    }
    sections = {
        "Run": network,
        "Data": data,
        "Versions": environment.get("versions", {}),
        "Hardware": machine,
    }
    return {
        title: {name: str(value) for name, value in facts.items() if value not in (None, "")}
        for title, facts in sections.items()
        if facts
    }


def _rounded(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds:,.1f}"
