"""The report's page and files: complete figures, escaped foreign text, no half-written files."""

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import scenes
from forked import workers
from report_scenes import NAME, Scene, as_found, invoke, parse, without

from vitadapter_zoo import load, save_pretrained
from vitadapter_zoo.catalog import PAPER
from vitadapter_zoo.evaluation.dataset import coco_paths, read_dataset
from vitadapter_zoo.evaluation.results_file import read_results
from vitadapter_zoo.evaluation.scoring import FIGURES, KINDS
from vitadapter_zoo.evaluation.verdict import Verification, judge
from vitadapter_zoo.reports import report
from vitadapter_zoo.weights import atomic

TRAINED = "adapter-n-emoji"
EXTERNAL = re.compile(r"^(?!#)(?!data:)")


def test_verify_writes_a_report_that_says_what_it_rests_on_and_score_agrees(tmp_path: Path) -> None:
    """With the trained detector of the package."""
    root = scenes.validation_images(tmp_path / "coco", 3)
    save_pretrained(load(TRAINED), tmp_path / "model")
    folder = tmp_path / "report"
    small = "verify", str(tmp_path / "model"), "--coco", str(root), "--expect", "1", "1"
    # As a user runs it: the command stands in the report.
    result = subprocess.run(
        [Path(sys.executable).parent / "vitadapter-zoo", *small, "--report", folder, "--json"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1, result.stderr
    written = json.loads((folder / "report.json").read_text())
    printed = json.loads(result.stdout)
    assert {key: written[key] for key in printed} == printed
    assert written["command"].startswith(f"vitadapter-zoo verify {tmp_path / 'model'} --coco ")
    identity = written["identity"]
    annotations = coco_paths(root)[0].read_bytes()
    assert identity["annotations_sha256"] == hashlib.sha256(annotations).hexdigest()
    assert re.fullmatch("[0-9a-f]{64}", identity["weights_sha256"])
    assert re.fullmatch("[0-9a-f]{64}", written["images_sha256"])
    assert (identity["precision"], identity["resize"]) == ("float32", "OpenCV bilinear")
    assert written["environment"]["versions"]["hotcoco"]
    assert written["environment"]["machine"]["processor"]
    assert written["seconds"] > 0
    text = parse(folder / "report.html").text
    for fact in (identity["weights_sha256"], written["command"], identity["annotations_sha256"]):
        assert fact in text

    scored = invoke(
        "score", str(folder / "detections.json"), "--coco", str(root), "--model", TRAINED,
        "--json", "--report", str(tmp_path / "scored"),
    )  # fmt: skip
    assert scored.exit_code == 3, scored.output
    again = json.loads((tmp_path / "scored" / "report.json").read_text())
    for kind in KINDS:
        assert again[kind] == written[kind]
        assert again[kind]["figures"]["AP50"] > 0.3
        assert len(again[kind]["figures"]) == len(FIGURES) == 12
    assert again["results_sha256"] == atomic.sha256(folder / "detections.json")
    assert (tmp_path / "scored" / "detections.json").read_bytes() == (
        folder / "detections.json"
    ).read_bytes()


def test_the_page_needs_nothing_else_and_has_the_figures_of_the_json(
    found: Verification, tmp_path: Path
) -> None:
    report.write(found, tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    page = parse(tmp_path / "report.html")
    assert [address for address in page.addresses if EXTERNAL.match(address)] == [PAPER]
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    source = (tmp_path / "report.html").read_text()
    assert "@import" not in source
    assert "url(" not in source
    assert "prefers-color-scheme: dark" in source
    for kind in KINDS:
        for name, value in content[kind]["figures"].items():
            if value == -1:
                assert f"{kind}-{name}" not in page.values
            else:
                assert page.values[f"{kind}-{name}"] == 100 * value
        assert page.values[f"measured-{kind}"] == content["comparisons"][kind]["measured"]
        assert page.values[f"published-{kind}"] == content["comparisons"][kind]["published"]
        assert page.values[f"difference-{kind}"] == content["comparisons"][kind]["difference"]
    by_class = sorted(content["mask"]["per_class"].values(), reverse=True)
    measured = [100 * value for value in by_class if value != -1]
    assert [page.values[f"class-{row + 1}-3"] for row in range(len(measured))] == measured
    assert sum(content["score_histogram"]) == content["images"]["detections"]
    assert page.tags.count("polyline") == 6


def test_the_terminal_shows_every_figure(
    scene: Scene, found: Verification, capsys: pytest.CaptureFixture[str]
) -> None:
    lone = judge(NAME, scene.data, scene.results[2:], (46.0, 41.0))  # the image without objects
    for one in (found, lone):
        report.print_table(one)
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        for name in FIGURES:
            values = [scores.figures[name] for scores in (one.box, one.mask)]
            shown = ["-" if value == -1 else f"{100 * value:.2f}" for value in values]
            assert [name, *shown] in [line[:3] for line in lines]
    assert lone.verdict == "inconclusive"
    assert lone.comparisons[0].difference is None


def test_the_mean_of_each_curve_is_the_ap(found: Verification) -> None:
    for scores in (found.box, found.mask):
        curves = report.curves(scores)
        for iou, name in (("0.50", "AP50"), ("0.75", "AP75"), ("0.50:0.95", "AP")):
            assert len(curves[iou]) == 101
            assert sum(curves[iou]) / 101 == pytest.approx(scores.figures[name], abs=1e-12)


def test_a_part_says_why_its_ap_is_not_the_published_one(scene: Scene, tmp_path: Path) -> None:
    part = judge(NAME, scene.data, scene.results[:2], (46.0, 41.0), random_part=True)
    report.write(part, tmp_path)
    page = parse(tmp_path / "report.html")
    interval = part.comparisons[0].interval
    assert interval is not None
    assert page.values["low-box"] == 100 * interval.low
    assert page.values["high-box"] == 100 * interval.high
    text = " ".join(page.text.split())
    assert "The AP of a part cannot be compared with them: it is biased" in text
    assert "images which were not evaluated count there as images without detections" in text
    # No folder of images was given.
    assert "No picture: the images were not given." in text
    assert "img" not in page.tags


def test_hostile_names_stay_text(scene: Scene, tmp_path: Path) -> None:
    content = json.loads(scene.data.annotations.read_text())
    for category in content["categories"]:
        category["name"] = f"<script>alert('{category['name']}')</script>"
    for image in content["images"]:
        image["file_name"] = f'"><img src="http://127.0.0.1/{image["id"]}">.jpg'
    path = tmp_path / "hostile.json"
    path.write_text(json.dumps(content))
    data = read_dataset(path, tmp_path)
    report.write(
        judge('<a href="http://x">', data, scene.results, None, images=tmp_path), tmp_path / "out"
    )
    page = parse(tmp_path / "out" / "report.html")
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert page.tags.count("a") == 1
    assert "<script>alert('person')</script>" in page.text
    assert "cannot read the image" in page.text


def test_what_cannot_be_seen_is_escaped_in_the_page(scene: Scene, tmp_path: Path) -> None:
    """Control characters, terminal escapes and changes of direction; also in the pictures."""
    content = json.loads(scene.data.annotations.read_text())
    for category in content["categories"]:
        category["name"] += "\x1b[2J\n\u202e\x00" + "x" * 5000
    path = tmp_path / "hostile.json"
    path.write_text(json.dumps(content))
    data = read_dataset(path, scene.data.folder)
    found = judge("a\x9bb", data, as_found(scene)[:1], None, images=scene.data.folder)
    missed = replace(found, results=tuple(without(one, 1) for one in found.results))
    report.write(missed, tmp_path / "out", command="vitadapter-zoo verify 'a\\b'")
    text = (tmp_path / "out" / "report.html").read_text()
    assert "x" * 2000 not in text
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    page = parse(tmp_path / "out" / "report.html")
    assert r"person\x1b[2J\n\u202e\x00xxx" in page.text
    assert r"vitadapter-zoo verify 'a\b'" in page.text
    assert page.tags.count("img") == 2


KILLED = """
import resource, signal, sys
from pathlib import Path
from vitadapter_zoo.reports import report
from vitadapter_zoo.evaluation.dataset import coco_paths, read_dataset
from vitadapter_zoo.evaluation.results_file import read_results
from vitadapter_zoo.evaluation.verdict import judge
root, folder, limit, source = *map(Path, sys.argv[1:3]), int(sys.argv[3]), Path(sys.argv[4])
data = read_dataset(*coco_paths(root))
found = judge("another model", data, read_results(source, data), None)
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
report.write(found, folder)
"""


def test_a_killed_writer_leaves_whole_files(
    scene: Scene, found: Verification, tmp_path: Path
) -> None:
    """The system kills a process at the byte that is over its limit."""
    (tmp_path / "none.json").write_text("[]")
    report.write(found, tmp_path / "old")
    old = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    empty = judge(NAME, scene.data, read_results(tmp_path / "none.json", scene.data), None)
    report.write(empty, tmp_path / "new")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "new").iterdir()}
    assert sizes["detections.json"] < sizes["report.json"] < sizes["report.html"] - 1000
    rounds = {
        "detections.json": (len(old["detections.json"]) // 2, tmp_path / "old" / "detections.json"),
        "report.json": (sizes["report.json"] // 2, tmp_path / "none.json"),
        "report.html": (sizes["report.html"] - 1000, tmp_path / "none.json"),
    }
    processes = {}
    for name, (limit, source) in rounds.items():
        folder = shutil.copytree(tmp_path / "old", tmp_path / name)
        arguments = [str(scene.root), str(folder), str(limit), str(source)]
        processes[name] = workers().start(KILLED, *arguments)
    for name, process in processes.items():
        assert process.wait().returncode == -signal.SIGXFSZ
        assert (tmp_path / name / name).read_bytes() == old[name]
        json.loads((tmp_path / name / "report.json").read_text())
        report.write(empty, tmp_path / name)
        assert {path.name for path in (tmp_path / name).iterdir()} == set(old)


def test_a_report_that_cannot_be_written_is_told_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = invoke(
        "verify", NAME, "--coco", str(tmp_path / "none"), "--report", str(tmp_path / "file" / "out")
    )
    assert result.exit_code == 2
    assert "no report can be written to" in result.output
    result = invoke("verify", NAME, "--coco", str(tmp_path), "--report", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("link", [False, True])
def test_a_report_never_replaces_what_is_scored(link: bool, tmp_path: Path) -> None:
    """Results in a folder of an earlier report, annotations that are called like a report."""
    folder = tmp_path / "report"
    folder.mkdir()
    results, annotations = folder / "detections.json", tmp_path / "report.json"
    results.write_text("[]")
    annotations.write_text("{}")
    inputs = [str(results), "--annotations", str(annotations)]
    out = folder
    if link:  # the annotations under the report's name
        (tmp_path / "out").mkdir()
        out = tmp_path / "out"
        (out / "report.json").symlink_to(annotations)
    result = invoke("score", *inputs, "--model", NAME, "--report", str(out))
    assert result.exit_code == 2
    assert "which is never replaced" in result.output
    result = invoke("verify", NAME, *inputs[1:], "--report", str(tmp_path))
    assert result.exit_code == 2
    assert "which is never replaced" in result.output
    assert (results.read_text(), annotations.read_text()) == ("[]", "{}")


def test_the_folder_of_a_report_may_be_text_in_the_home_folder(
    found: Verification, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    report.write(found, "~/out")
    assert (tmp_path / "out" / "report.html").is_file()


def test_no_detections_and_no_objects_make_a_page_too(scene: Scene, tmp_path: Path) -> None:
    empty = [
        replace(result, boxes=[], scores=[], category_ids=[], masks=[]) for result in scene.results
    ]
    report.write(judge(NAME, scene.data, empty, None), tmp_path)
    assert json.loads((tmp_path / "detections.json").read_text()) == []
    assert read_results(tmp_path / "detections.json", scene.data) == [
        replace(result, image_sha256="") for result in empty
    ]
    lone = judge(NAME, scene.data, empty[2:], None)  # the image without objects
    assert report.curves(lone.box)["0.50"] == []
    report.write(lone, tmp_path / "lone")
    assert "There are none." in parse(tmp_path / "lone" / "report.html").text
