"""The page of `verify --all`: a row for each checkpoint, written while they are evaluated."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from report_scenes import NAME, Scene, invoke, parse

from vitadapter_zoo import load
from vitadapter_zoo.catalog import PAPER, PUBLISHED, ROWS, get_row
from vitadapter_zoo.errors import DownloadError, ZooError
from vitadapter_zoo.evaluation.identity import run_directory, run_identity
from vitadapter_zoo.evaluation.run import open_run
from vitadapter_zoo.evaluation.verdict import Verification
from vitadapter_zoo.reports import overview
from vitadapter_zoo.weights import atomic, cache, convert, resolve


def test_the_index_sorts_by_every_column(found: Verification, tmp_path: Path) -> None:
    overview.verify_all(lambda row: found, found.annotations, tmp_path, rows=ROWS[:2])
    source = (tmp_path / "index.html").read_text()
    assert re.findall('data-column="([0-9])"', source) == list("01234567")
    first = source.partition("<tbody>")[2].partition("</tbody>")[0]
    values = re.findall('data-sort="([^"]*)"', first)
    assert values[0] == ROWS[0].name
    assert [float(value) for value in values[2:]] == [
        value
        for one in found.comparisons
        for value in (one.published, one.measured, one.difference)
    ]


def add_to_cache(row_name: str, path: Path) -> None:
    """Weights as if they had been downloaded from where the catalog says."""
    row = get_row(row_name)
    source = str(resolve.published(row))
    place = cache.entry(row.name, source)
    digest = atomic.sha256(path)
    convert.to_safetensors([path], source, row, place.weights, sha256=digest)
    status = place.weights.stat()
    place.write(
        cache.Provenance(
            model=row.name, source=source, source_sha256=digest, source_size=path.stat().st_size,
            source_mtime_ns=None, container="torch zip", sha256=atomic.sha256(place.weights),
            size=status.st_size, mtime_ns=status.st_mtime_ns, date=atomic.now(),
            tool_version="test",
        )
    )  # fmt: skip


def test_all_lists_every_row_with_its_verdict_or_its_error(
    scene: Scene, published_file: Callable[[str], Path], tmp_path: Path
) -> None:
    add_to_cache(NAME, published_file(NAME))
    identity = run_identity(load(NAME, offline=True), scene.data)
    with open_run(run_directory(NAME, identity), identity) as run:  # so that nothing is computed
        for one in scene.results:
            run.append(one)
    arguments = ("verify", "--all", "--coco", str(scene.root), "--offline")
    result = invoke(*arguments, "--report", str(tmp_path / "zoo"))
    assert result.exit_code == 2, result.output
    # That the network may not be used is said once, not for each of the other rows.
    assert result.output.count("this is offline mode") == 1
    assert f"weights of {len(PUBLISHED) - 1} models" in result.output
    content = json.loads((tmp_path / "zoo" / "index.json").read_text())
    assert [row["model"] for row in content["rows"]] == [row.name for row in PUBLISHED]
    page = parse(tmp_path / "zoo" / "index.html")
    links = [address for address in page.addresses if address != PAPER]
    assert links == [f"{NAME}/report.html"]
    assert (tmp_path / "zoo" / links[0]).exists()
    for row in content["rows"]:
        assert row["model"] in page.text
        if row["model"] == NAME:
            assert row["status"] == "inconclusive"
            own = json.loads((tmp_path / "zoo" / NAME / "report.json").read_text())
            measured = own["comparisons"]["box"]["measured"]
            assert row["box"]["measured"] == page.values[f"{NAME}-box"] == measured
            assert own["images_before"] == 3
        else:
            assert row["status"] == "failed"
            assert "offline mode" in row["reason"]
            assert row["reason"] in page.text.replace("\n", " ")
            assert row["box"]["published"] == get_row(row["model"]).box_ap


def test_the_page_of_all_grows_row_by_row(found: Verification, tmp_path: Path) -> None:
    seen: list[list[str]] = []
    outcomes: Iterator[Verification | ZooError] = iter(
        [found, DownloadError("<b>no</b> server"), found]
    )

    def evaluate(row: Any) -> Verification:
        if (tmp_path / "index.json").exists():
            rows = json.loads((tmp_path / "index.json").read_text())["rows"]
            seen.append([row["status"] for row in rows])
        outcome = next(outcomes)
        if isinstance(outcome, ZooError):
            raise outcome
        return outcome

    overview.verify_all(evaluate, found.annotations, tmp_path, rows=ROWS[:3])
    assert seen == [["refuted", "pending", "pending"], ["refuted", "failed", "pending"]]
    page = parse(tmp_path / "index.html")
    assert "<b>no</b> server" in page.text
    assert "pending" not in page.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([NAME, "--all"], "either NAME or --all"),
        ([], "either NAME or --all"),
        (["--all", "--checkpoint", "x.pth"], "belong to one model"),
        (["--all", "--expect", "1", "1"], "belong to one model"),
    ],
)
def test_name_and_all_exclude_each_other(arguments: Sequence[str], message: str) -> None:
    result = invoke("verify", *arguments, "--coco", "none")
    assert result.exit_code == 2
    assert message in result.output
