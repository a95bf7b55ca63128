"""Measured figures in model cards, from the ``report.json`` that ``verify`` writes.

The card gets the figures in its metadata (``model-index``, with a source) and a section that names
everything that they depend on. A reduced report without paths goes beside the card, so that the
result travels with the weights.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from vitadapter_zoo.catalog import Row
from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.publishing.cards import DATASET, EMOJI, markdown
from vitadapter_zoo.text import JSONError, quoted, read_json, shown

REPORT = "verification.json"  # beside the card
LARGEST = 256 * 2**20  # bytes of a report; those of COCO val2017 have less than one MB
TASKS = {"box": "object-detection", "mask": "instance-segmentation"}
SHA256 = re.compile(r"[0-9a-f]{64}")
SECTION = "<!-- measured by vitadapter-zoo -->"
END = "<!-- end of what vitadapter-zoo measured -->"
NOTHING = -1.0  # COCO's figure if no object is annotated


@dataclass(frozen=True)
class Measured:
    """The part of a report that goes into a card: one detector, without paths.

    Attributes:
        row: load name of the detector's network.
        by_name: whether these are the weights of that name, rather than a folder's or a file's.
        verdict: confirmed, refuted or inconclusive.
        reason: of the verdict.
        compared: whether the figures were compared with published ones.
        images: number of images, the whole data set.
        annotations: name of the annotation file.
        figures: COCO's figures by kind (box, mask) and name, 0..1, -1 where nothing is annotated.
        weights_sha256: over all names and values of the state dict.
        annotations_sha256: of the annotation file.
        images_sha256: over all image files.
        precision: dtype of the weights, ``float32`` for instance.
        hardware: processor or GPU, and the number of threads on a CPU.
        operator: compiled or reference.
        versions: of this package, torch and what else the figures depend on.
        date: when the report was written, ISO 8601.
    """

    row: str
    by_name: bool
    verdict: str
    reason: str
    compared: bool
    images: int
    annotations: str
    figures: dict[str, dict[str, float]]
    weights_sha256: str
    annotations_sha256: str
    images_sha256: str
    precision: str
    hardware: str
    operator: str
    versions: dict[str, str]
    date: str

    def record(self) -> dict[str, Any]:
        """Build the reduced report, ready for JSON."""
        return asdict(self)


def read_report(path: Path) -> Measured:
    """Read a report of ``verify``.

    Raises:
        ZooError: it cannot be read, is of ``score`` (which does not know the weights), or covers a
            part of the data set only, whose AP is biased.
    """
    try:
        content = read_json(path, LARGEST)
    except JSONError as error:
        raise ZooError(f"cannot read the report {shown(path, 300)}: {error}") from error
    try:
        images = content["images"]
        if "identity" not in content:
            raise ZooError(
                f"{shown(path, 300)} does not say which weights it is of; write it with "
                "`vitadapter-zoo verify ... --report`, not with `score`"
            )
        if images["evaluated"] != images["total"]:
            raise ZooError(
                f"{shown(path, 300)} covers {images['evaluated']} of {images['total']} images, and "
                "the AP of a part is biased; verify without --limit, --max-minutes and "
                "--skip-bad-images"
            )
        return _measured(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ZooError(
            f"{shown(path, 300)} is not a report.json of `vitadapter-zoo verify --report` "
            f"({type(error).__name__}: {shown(error)}); give that file"
        ) from error


def _measured(content: Mapping[str, Any]) -> Measured:
    identity = content["identity"]
    count = identity["threads"]
    threads = f", {count} thread{'s' if count > 1 else ''}" if count else ""
    comparison = content["comparisons"]["box"]
    return Measured(
        row=str(identity["model"]),
        by_name=content["model"] == identity["model"] and content.get("checkpoint") is None,
        verdict=str(content["verdict"]),
        reason=str(content["reason"]),
        compared=content["reference"] == "published" and comparison["published"] is not None,
        images=int(content["images"]["total"]),
        annotations=Path(str(content["annotations"])).name,
        figures={kind: _figures(content[kind]["figures"]) for kind in TASKS},
        weights_sha256=_sha256(identity["weights_sha256"]),
        annotations_sha256=_sha256(identity["annotations_sha256"]),
        images_sha256=_sha256(content["images_sha256"]),
        precision=str(identity["precision"]),
        hardware=f"{identity['processor']}{threads}",
        operator=str(identity["operator"]),
        versions={
            "python": str(content["environment"]["versions"]["python"]),
            **{str(name): str(version) for name, version in identity["versions"].items()},
        },
        date=str(content["date"]),
    )


def _figures(figures: Mapping[str, Any]) -> dict[str, float]:
    found = {str(name): float(value) for name, value in figures.items()}
    if "AP" not in found or any(not (-1 <= value <= 1) for value in found.values()):
        raise ValueError("figures outside of 0..1")
    return found


def _sha256(value: Any) -> str:
    if not SHA256.fullmatch(str(value)):
        raise ValueError(f"{quoted(value)} is not a sha256")
    return str(value)


def add_measured(
    card: ModelCard, measured: Measured, row: Row, *, name: str, source: str = REPORT
) -> None:
    """Add measured figures to a card; figures of an earlier report are replaced.

    Args:
        card: changed in place.
        measured: of the card's weights.
        row: the network's row.
        name: the model's name, for a card without one.
        source: address of the report, in the metadata.
    """
    data_set = _data_set(measured, row)
    data = cast("ModelCardData", card.data)
    data.model_name = data.model_name or name
    kept = [one for one in data.eval_results or [] if not _is_ours(one)]
    data.eval_results = kept + [
        result for kind in TASKS for result in _results(kind, measured, data_set, source)
    ]
    text = re.sub(f"\n*{re.escape(SECTION)}.*?{re.escape(END)}\n*", "\n", card.text, flags=re.S)
    before, heading, after = text.partition("\n## Training\n")
    section = f"\n{_section(measured, data_set, source)}\n"
    if not heading:
        before = text.rstrip() + "\n"
    card.text = f"{before}{section}{heading}{after}"


def _data_set(measured: Measured, row: Row) -> tuple[str, str]:
    """Return name and Hub type of the data set."""
    if not measured.compared:
        return f"{shown(measured.annotations, 60)}, {measured.images} images", "coco-format"
    return (EMOJI, "emoji") if row.made_here else (DATASET, "coco")


def _is_ours(result: EvalResult) -> bool:
    return "weights_sha256" in (result.metric_args or {})


def _results(
    kind: str, measured: Measured, data_set: tuple[str, str], source: str
) -> list[EvalResult]:
    """Return the AP of a kind and its parts, in points (0..100)."""
    version = measured.versions.get("vitadapter-zoo", "")
    return [
        EvalResult(
            task_type=TASKS[kind],
            dataset_type=data_set[1],
            dataset_name=data_set[0],
            dataset_split="val2017" if data_set[1] == "coco" else "val",
            # Results of the same task and data set share a source in the metadata. The revision
            # keeps these apart from the published ones.
            dataset_revision=f"sha256:{measured.annotations_sha256}",
            metric_type=f"{kind}_{figure.lower()}",
            metric_name=f"{kind} {figure}",
            metric_value=round(100 * value, 4),
            metric_args={
                "weights_sha256": measured.weights_sha256,
                "precision": measured.precision,
                "hardware": shown(measured.hardware, 120),
                "versions": ", ".join(f"{name} {v}" for name, v in measured.versions.items()),
            },
            source_name=f"measured with vitadapter-zoo {version}, {measured.date[:10]}",
            source_url=source,
        )
        for figure, value in measured.figures[kind].items()
        if figure.startswith("AP") and value != NOTHING
    ]


def _section(measured: Measured, data_set: tuple[str, str], source: str) -> str:
    names = list(measured.figures["box"])
    lines = [
        f"| {kind} | "
        + " | ".join("-" if figures[name] == NOTHING else f"{100 * figures[name]:.2f}"
                     for name in names)
        + " |"
        for kind, figures in measured.figures.items()
    ]  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in measured.versions.items())
    header = " | ".join(names)
    return f"""{SECTION}
## Measured

With these weights, on all {measured.images:,} images of {markdown(data_set[0])}, by
`vitadapter-zoo verify` on {markdown(measured.date[:10])}: **{markdown(measured.verdict)}**
({markdown(measured.reason, 300)}).

| | {header} |
|---|{"---|" * len(names)}
{chr(10).join(lines)}

| | |
|---|---|
| weights | sha256 `{measured.weights_sha256}` of all names and values, {markdown(measured.precision)} |
| annotations | sha256 `{measured.annotations_sha256}` |
| images | sha256 `{measured.images_sha256}` |
| hardware | {markdown(measured.hardware, 300)} |
| deformable attention | {markdown(measured.operator)} |
| versions | {markdown(versions, 300)} |

The figures with all digits are in [{source.rpartition("/")[2]}]({source}).
{END}
"""  # noqa: E501
