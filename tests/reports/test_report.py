"""Reports: what stands in the files, and that they are whole; on what a small network found."""

import base64
import contextlib
import hashlib
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import scenes
from click.testing import CliRunner, Result
from forked import workers
from PIL import Image

from vitadapter_zoo import MaskRCNN, cli, load, save_pretrained
from vitadapter_zoo.catalog import PAPER, PUBLISHED, ROWS, get_row
from vitadapter_zoo.errors import DownloadError, ZooError
from vitadapter_zoo.evaluation.dataset import Dataset, coco_paths, read_dataset
from vitadapter_zoo.evaluation.evaluator import Evaluator, read
from vitadapter_zoo.evaluation.identity import run_directory, run_identity
from vitadapter_zoo.evaluation.results_file import read_results
from vitadapter_zoo.evaluation.run import ImageResult, Run, open_run
from vitadapter_zoo.evaluation.scoring import FIGURES, KINDS, Annotations
from vitadapter_zoo.evaluation.verdict import Verification, judge
from vitadapter_zoo.reports import live, overview, report, worst_images
from vitadapter_zoo.weights import atomic, cache, convert, resolve

NAME = "adapter-t-deit-3x"
TRAINED = "adapter-n-emoji"
EXTERNAL = re.compile(r"^(?!#)(?!data:)")


@dataclass
class Page(HTMLParser):
    """What a page holds: addresses, values by id, and text by element."""

    addresses: list[str] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self.addresses += [
            value for name, value in attrs if name in ("src", "href", "srcset", "data") and value
        ]
        if tag == "data":
            self.values[found["id"] or ""] = float(found["value"] or "nan")

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


@dataclass(frozen=True)
class Scene:
    """A data set of three images with what the small detector finds in them."""

    root: Path
    data: Dataset
    model: MaskRCNN
    results: tuple[ImageResult, ...]


@pytest.fixture(scope="module")
def scene(small: MaskRCNN, tmp_path_factory: Any) -> Scene:
    model = small
    root = scenes.write_coco(tmp_path_factory.mktemp("coco"), model, 3)
    data = read_dataset(*coco_paths(root))
    evaluator = Evaluator(model, data.category_ids(model.categories))
    results = []
    for image in data.images:
        prepared = evaluator.prepare(read(image))
        assert not isinstance(prepared, ImageResult)
        results.append(evaluator.finish(prepared, evaluator.detect(prepared)))
    return Scene(root, data, model, tuple(results))


@pytest.fixture(scope="module")
def found(scene: Scene) -> Verification:
    return judge(NAME, scene.data, scene.results, (46.0, 41.0), images=scene.data.folder)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)


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


def as_found(scene: Scene) -> list[ImageResult]:
    """Detections that are the annotations themselves, each once, with sure scores."""
    results = []
    for image in scene.data.images:
        objects = [one for one in scene.data.objects if one.image_id == image.image_id]
        results.append(
            ImageResult(
                image_id=image.image_id,
                size=image.size,
                boxes=[one.box for one in objects],
                scores=[0.9] * len(objects),
                category_ids=[one.category_id for one in objects],
                masks=[one.mask.decode() for one in objects],
            )
        )
    return results


def without(result: ImageResult, count: int) -> ImageResult:
    """The result with the scores of the last ones too low to count."""
    kept = len(result.scores) - count
    return replace(result, scores=[0.9] * kept + [0.1] * count)


def test_the_worst_images_are_those_with_the_most_mistakes(scene: Scene) -> None:
    first, second, empty = as_found(scene)
    assert not empty.scores
    assert worst_images.worst(judge(NAME, scene.data, [first, second, empty], None)) == []
    stray = replace(
        empty, boxes=second.boxes[:1], scores=[0.8], category_ids=[1], masks=["0"],
    )  # fmt: skip
    found = judge(
        NAME, scene.data, [without(first, 2), without(second, 3), stray], None,
        images=scene.data.folder,
    )  # fmt: skip
    chosen = worst_images.worst(found)
    counted = [(one.image_id, one.objects, one.missed, one.false) for one, _ in chosen]
    assert counted == [
        (second.image_id, len(second.scores), 3, 0),
        (first.image_id, len(first.scores), 2, 0),
        (empty.image_id, 0, 0, 1),
    ]
    for _, pictures in chosen:
        assert isinstance(pictures, worst_images.Pictures)
        for encoded in (pictures.annotations, pictures.detections):
            assert max(Image.open(io.BytesIO(encoded)).size) == worst_images.LONGEST_SIDE


def test_unmatched_names_annotations_and_detections(scene: Scene) -> None:
    first, second, empty = as_found(scene)
    annotations = Annotations(scene.data)
    doubled = replace(  # its first object a second time, as the third detection
        second,
        boxes=[*second.boxes[:2], second.boxes[0], *second.boxes[2:]],
        scores=[0.9, 0.9, 0.8, *second.scores[2:]],
        category_ids=[*second.category_ids[:2], second.category_ids[0], *second.category_ids[2:]],
        masks=[*second.masks[:2], second.masks[0], *second.masks[2:]],
    )
    short = replace(
        first,
        boxes=first.boxes[1:],
        scores=first.scores[1:],
        category_ids=first.category_ids[1:],
        masks=first.masks[1:],
    )
    lost = next(one for one in scene.data.objects if one.image_id == first.image_id).annotation_id
    found = annotations.unmatched([empty, doubled, short], "mask")
    assert [one.missed for one in found] == [(), (), (lost,)]
    assert [one.false for one in found] == [(), (2,), ()]


def test_the_pictures_are_in_the_page(found: Verification, tmp_path: Path) -> None:
    content = report.write(found, tmp_path)
    assert content["worst_images"]
    page = parse(tmp_path / "report.html")
    uris = [address for address in page.addresses if address.startswith("data:image/jpeg;base64,")]
    assert len(uris) == 2 * len(content["worst_images"])
    for uri in uris:
        Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).load()


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


# The whole zoo


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


# The line on the terminal


def watched(scene: Scene, directory: Path, shown: bool) -> str:
    """What a terminal shows when the second and third image are finished."""
    leader, follower = pty.openpty()
    first, *others = scene.results
    run = Run(directory)
    directory.mkdir()
    run.append(first)
    with os.fdopen(follower, "w") as terminal, contextlib.redirect_stderr(terminal):
        with live.evaluation(scene.data, shown) as watch:
            assert (watch is not None) == shown
            for result in others:
                run.append(result)
                if watch is not None:
                    watch(run, scene.data.images)
                    time.sleep(1)  # until the AP so far is known
        output = ""
        if shown:
            output = os.read(leader, 100_000).decode()
    os.close(leader)
    return output


def test_the_line_counts_images_and_says_what_was_there_already(
    scene: Scene, tmp_path: Path
) -> None:
    output = watched(scene, tmp_path / "run", True)
    assert "1 of 3 images were evaluated in an earlier call" in output
    assert "3/3" in output
    assert re.search(r"AP of 2: box \d+\.\d, mask \d+\.\d", output)
    assert watched(scene, tmp_path / "quiet", False) == ""
    with live.evaluation(scene.data) as watch:
        assert watch is None  # pytest's stderr is no terminal


def test_the_running_ap_is_scored_seldom(scene: Scene) -> None:
    run = Run(Path(), {result.image_id: result for result in scene.results[:2]})
    annotations = Annotations(scene.data)
    expected = annotations.score(annotations.tabulate(scene.results[:2]), "mask").ap
    with ThreadPoolExecutor(1) as scorer:
        running = live.RunningAP(scene.data, scorer)
        assert running.text(run, scene.data.images) == ""
        scorer.submit(int).result()  # after the scoring
        text = running.text(run, scene.data.images)
        assert text.startswith("AP of 2: box ")
        assert text.endswith(f"mask {100 * expected:.1f}")
        run.results[scene.results[2].image_id] = scene.results[2]
        for _ in range(4):
            assert running.text(run, scene.data.images) == text
            scorer.submit(int).result()
