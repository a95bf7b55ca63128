"""Model cards with measured figures: what `verify` reports reaches the card, and nothing else."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scenes
from click.testing import CliRunner
from huggingface_hub import ModelCard, ModelCardData

from vitadapter_zoo import MaskRCNN, cli
from vitadapter_zoo.publishing.measured import REPORT

ROW = "adapter-t-deit-3x"


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code in (0, 3), result.output
    return result.stdout


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def verified(
    folder: Path, small: MaskRCNN, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A data set, and the report of the small detector on it."""
    root = scenes.write_coco(tmp_path_factory.mktemp("coco"), small, 3)
    report = root / "report"
    invoke("verify", str(folder), "--coco", str(root), "--report", str(report), "--quiet",
           "--threads", "1")  # fmt: skip
    return root, report / "report.json"


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """The folder with a card that its author has extended."""
    own = tmp_path / "my-model"
    shutil.copytree(folder, own)
    card = own / "README.md"
    card.write_text(card.read_text().replace("# ViT", "My own words.\n\n# ViT"))
    return own


def changed(report: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    content = json.loads(report.read_text())
    change(content)
    target.write_text(json.dumps(content))
    return target


def test_a_measured_result_travels_with_the_weights(verified: tuple[Path, Path], own: Path) -> None:
    root, report = verified
    for _ in range(2):  # the second time replaces what the first has written
        printed = invoke("card", str(own), "--report", str(report), "--in-place")
        assert printed == f"{own / 'README.md'}\n"
    content = json.loads(report.read_text())
    card = ModelCard.load(own / "README.md")
    assert card.text.count("My own words.") == card.text.count("## Measured") == 1
    assert card.data.model_name == "my-model"
    results = {one.metric_type: one for one in card.data.eval_results}
    assert len(results) == len(card.data.eval_results)
    for kind in ("box", "mask"):
        figures = content[kind]["figures"]
        for name in ("AP", "AP50", "AP75"):
            one = results[f"{kind}_{name.lower()}"]
            assert one.metric_value == pytest.approx(100 * figures[name], abs=1e-4)
            assert f"{100 * figures[name]:.2f}" in card.text
    one = results["mask_ap"]
    identity = content["identity"]
    assert one.task_type == "instance-segmentation"
    assert one.metric_args["weights_sha256"] == identity["weights_sha256"]
    assert identity["versions"]["torch"] in one.metric_args["versions"]
    assert identity["processor"] in one.metric_args["hardware"]
    assert one.dataset_revision == f"sha256:{identity['annotations_sha256']}"
    assert one.source_url == REPORT
    assert "vitadapter-zoo" in one.source_name
    assert identity["weights_sha256"] in card.text
    assert "inconclusive" in card.text
    reduced = (own / REPORT).read_text()
    assert json.loads(reduced)["figures"]["box"] == content["box"]["figures"]
    assert str(root) not in reduced + card.content  # paths of this machine do not travel


def test_published_and_measured_results_stay_apart(
    verified: tuple[Path, Path], tmp_path: Path
) -> None:
    def of_the_row(content: dict[str, Any]) -> None:
        content["model"] = content["identity"]["model"] = ROW
        for kind in ("box", "mask"):
            content["comparisons"][kind]["published"] = 46.0
        content["verdict"] = "confirmed"

    report = changed(verified[1], tmp_path / "r.json", of_the_row)
    card = ModelCard(invoke("card", ROW, "--report", str(report)))
    assert isinstance(card.data, ModelCardData)
    results = card.data.eval_results or []
    ours = [one for one in results if one.dataset_revision]
    published = [one for one in results if not one.dataset_revision]
    assert [one.metric_value for one in published] == [46.0, 41.0]
    assert {one.source_url for one in published} != {one.source_url for one in ours}
    assert {one.dataset_name for one in ours} == {"COCO val2017"}
    assert card.text.index("## Results") < card.text.index("## Measured")
    assert card.text.index("## Measured") < card.text.index("## Training")
    assert "**confirmed**" in card.text
    out = tmp_path / "out"
    invoke("card", ROW, "--report", str(report), "--out", str(out))
    assert {path.name for path in out.iterdir()} == {f"{ROW}.md", f"{ROW}.{REPORT}"}


def test_markup_in_a_report_stays_text(verified: tuple[Path, Path], tmp_path: Path) -> None:
    def hostile(content: dict[str, Any]) -> None:
        content["model"] = content["identity"]["model"] = ROW
        content["reason"] = "<script>alert(1)</script>\n\n# x"
        content["identity"]["versions"]["torch"] = "1\n---\n<b>"

    report = changed(verified[1], tmp_path / "r.json", hostile)
    card = ModelCard(invoke("card", ROW, "--report", str(report)))
    assert not re.search(r"(?<!\\)<(script|b)>", card.text)
    assert "\n# x" not in card.text


def test_reports_that_do_not_belong_to_the_card_are_refused(
    verified: tuple[Path, Path], own: Path, tmp_path: Path
) -> None:
    report = verified[1]
    name, target = str(own), tmp_path / "r.json"
    before = (own / "README.md").read_text()

    def refusal(change: Callable[[dict[str, Any]], None]) -> str:
        path = str(changed(report, target, change))
        return refused("card", name, "--report", path, "--in-place")

    assert "other weights" in refusal(lambda c: c["identity"].update(weights_sha256="0" * 64))
    assert "is not a sha256" in refusal(lambda c: c["identity"].update(weights_sha256="x"))
    assert "another model" in refusal(lambda c: c["identity"].update(model="vit-t-deit-3x"))
    assert "covers 2 of 3 images" in refusal(lambda c: c["images"].update(evaluated=2))
    assert "not with `score`" in refusal(lambda c: c.pop("identity"))
    assert "is not a report.json" in refusal(lambda c: c.pop("box"))
    assert "figures outside" in refusal(lambda c: c["box"]["figures"].update(AP=46.0))
    target.write_text("{")
    assert "cannot read the report" in refused("card", name, "--report", str(target))
    target.write_text("[]")
    assert "is not a report.json" in refused("card", name, "--report", str(target))
    assert "from a folder" in refused("card", ROW, "--report", str(report))
    of_a_file = changed(report, target, lambda c: c.update(model=ROW, checkpoint="mine.pth"))
    assert "or another file" in refused("card", ROW, "--report", str(of_a_file))
    assert "instead of --all" in refused("card", "--all", "--report", str(report))
    assert "writes into a folder" in refused("card", ROW, "--in-place")
    assert (own / "README.md").read_text() == before
    assert not (own / REPORT).exists()
    (own / "README.md").write_text("---\nlicense: [\n---\n")
    message = refused("card", name, "--report", str(report), "--in-place")
    assert "cannot read the metadata" in message
