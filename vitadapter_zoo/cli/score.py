"""``score``: give a verdict on a file of COCO results."""

from __future__ import annotations

import time
from pathlib import Path

import click

from vitadapter_zoo import settings
from vitadapter_zoo.catalog import get_row
from vitadapter_zoo.cli.models import model_names
from vitadapter_zoo.cli.verdicts import (
    VerdictCommand,
    data_options,
    dataset,
    output_options,
    report_folder,
    tell,
)


@click.command(
    cls=VerdictCommand,
    epilog="""\b
Example:
  vitadapter-zoo score results.json --coco /data/coco --model adapter-t-deit-3x
\b
Exit status: as for `verify`.
""",
)
@click.argument("results", type=click.Path(path_type=Path, dir_okay=False))
@data_options
@click.option(
    "--model",
    "name",
    required=True,
    shell_complete=model_names,
    metavar="NAME",
    help="Load name, see `list`.",
)
@output_options
def score(
    results: Path,
    coco: Path | None,
    annotations: Path | None,
    images: Path | None,
    ignore_exif: bool,
    name: str,
    expect: tuple[float, float] | None,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Score a file of COCO results, for example of the original code, and give a verdict."""
    started = time.monotonic()
    row = get_row(name)
    results, folder = settings.expanded(results), report_folder(folder, [results, annotations])
    data = dataset(name, coco, annotations, images, ignore_exif)
    from vitadapter_zoo.evaluation.results_file import read_results
    from vitadapter_zoo.evaluation.scoring import versions
    from vitadapter_zoo.evaluation.verdict import judge
    from vitadapter_zoo.weights import atomic

    published = (row.box_ap, row.mask_ap) if data.is_measured(row) else None
    judged = read_results(results, data)
    details = {
        "results": str(results),
        "results_sha256": atomic.sha256(results),
        "annotations_sha256": data.sha256,
        "environment": {"versions": versions()},
    }
    found = judge(
        row.name,
        data,
        judged,
        expect or published,
        reference="expected" if expect else "published",
        images=None if annotations is not None and images is None else data.folder,
        details=details,
    )
    found.details["seconds"] = time.monotonic() - started
    tell(found, as_json, folder)
