import copy
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import scenes
import standins
import torch
from click.testing import CliRunner, Result
from coco_oracle import by_pycocotools, random_data, written
from forked import heed_interrupts

import vitadapter_zoo
from vitadapter_zoo import (
    DatasetError,
    ImageError,
    MaskRCNN,
    Verification,
    ZooError,
    get_row,
)
from vitadapter_zoo.backends.comparison import matches
from vitadapter_zoo.cli import main
from vitadapter_zoo.evaluation.dataset import Image, read_dataset, sampling_order
from vitadapter_zoo.evaluation.evaluator import Evaluator, Prepared, read
from vitadapter_zoo.evaluation.run import PREDICTIONS, ImageResult, open_run
from vitadapter_zoo.evaluation.scoring import FIGURES, KINDS
from vitadapter_zoo.evaluation.verdict import judge
from vitadapter_zoo.reports import report

COMMAND = [sys.executable, "-m", "vitadapter_zoo.cli", "verify"]
PICTURES = 6


@pytest.fixture(scope="module")
def coco(small: MaskRCNN, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in COCO's layout; tests that change it copy it."""
    return scenes.write_coco(tmp_path_factory.mktemp("coco"), small, PICTURES)


@pytest.fixture(scope="module")
def undisturbed(
    small: MaskRCNN, coco: Path, tmp_path_factory: pytest.TempPathFactory
) -> Verification:
    return vitadapter_zoo.verify(small, coco, run=tmp_path_factory.mktemp("run"))


def annotation_file(root: Path) -> Path:
    return root / "annotations" / "instances_val2017.json"


@pytest.fixture
def changed(coco: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], None]], Path]:
    """A copy of the data set with its annotations changed."""

    def make(change: Callable[[dict[str, Any]], None]) -> Path:
        root = tmp_path / "changed"
        shutil.copytree(coco, root)
        content = json.loads(annotation_file(root).read_text())
        change(content)
        annotation_file(root).write_text(json.dumps(content))
        return root

    return make


def figures(found: Verification) -> list[float]:
    return [scores.figures[name] for scores in (found.box, found.mask) for name in FIGURES]


def command(*arguments: str | float | Path) -> Result:
    """The command in this process; those that end badly have one of their own below."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_gives_the_figures_of_pycocotools(undisturbed: Verification, coco: Path) -> None:
    results = list(undisturbed.results)
    assert len(results) == undisturbed.total == PICTURES
    assert [one.image_id for one in results] == sorted(one.image_id for one in results)
    expected = [by_pycocotools(annotation_file(coco), results, kind).stats for kind in KINDS]
    np.testing.assert_allclose(figures(undisturbed), np.concatenate(expected), rtol=0, atol=1e-9)
    assert 0.1 < undisturbed.mask.ap < 0.9


@pytest.mark.parametrize("name", ["adapter-t-deit-3x", "vit-t-deit-3x"])
def test_records_the_masks_that_the_original_gave(
    name: str, standin_model: Callable[[str], MaskRCNN]
) -> None:
    model = standin_model(name)
    stored = np.load(standins.DATA / "outputs" / f"{name}.npz")
    height, width = (int(side) for side in stored["meta.ori_shape"][:2])
    evaluator = Evaluator(model, tuple(range(80)))
    task = read(Image(1, standins.PHOTO, (height, width), frozenset()))
    prepared = evaluator.prepare(task)
    assert isinstance(prepared, Prepared)
    result = evaluator.finish(prepared, evaluator.detect(prepared))
    apart = 1e4  # keeps the classes from matching each other
    x, y, w, h = torch.tensor(result.boxes).unbind(1)
    shift = apart * torch.tensor(result.category_ids)[:, None]
    found = matches(
        torch.stack([x, y, x + w, y + h], dim=1) + shift,
        torch.tensor(result.scores),
        torch.from_numpy(stored["boxes"] + apart * stored["labels"][:, None]),
        torch.from_numpy(stored["scores"]),
    )
    assert sorted(found.tolist()) == list(range(len(result.scores)))
    ours = [result.masks[place] for place in found.tolist()]
    assert ours == [str(counts) for counts in stored["mask_rle"]]


def test_the_verdict_is_about_a_tenth_of_a_point(
    small: MaskRCNN, coco: Path, undisturbed: Verification, tmp_path: Path
) -> None:
    box, mask = (round(one.measured, 1) for one in undisturbed.comparisons)
    run = undisturbed.details["run"]

    def verdict(*expected: float) -> str:
        return vitadapter_zoo.verify(small, coco, run=run, expected=expected).verdict  # type: ignore[arg-type]

    assert verdict(box, mask) == "confirmed"
    assert verdict(box + 0.1, mask - 0.1) == "confirmed"
    assert verdict(box + 0.2, mask) == "refuted"
    assert verdict(box, mask - 0.2) == "refuted"
    assert undisturbed.verdict == "inconclusive"  # nothing is published for these data
    assert "val2017" in undisturbed.reason


def test_a_part_never_confirms_but_may_refute(
    small: MaskRCNN, coco: Path, undisturbed: Verification
) -> None:
    run = undisturbed.details["run"]
    near = vitadapter_zoo.verify(
        small, coco, run=run, limit=4,
        expected=(undisturbed.comparisons[0].measured, undisturbed.comparisons[1].measured),
    )  # fmt: skip
    assert near.verdict == "inconclusive"
    assert near.evaluated == 4
    for one in near.comparisons:
        assert one.interval is not None
        assert one.interval.low <= one.interval.estimate <= one.interval.high
    # The four images were in the run: nothing was computed.
    assert near.details["images_before"] == 4


def test_a_part_refutes_what_lies_outside_its_interval(tmp_path: Path) -> None:
    content, results = random_data(9, images=120)
    data = read_dataset(written(content, tmp_path), tmp_path)
    whole = judge("model", data, results, None)
    measured = (100 * whole.box.ap, 100 * whole.mask.ap)
    chosen = {one.image_id for one in sampling_order(data, 0)[:70]}
    part = [one for one in results if one.image_id in chosen]

    def of_part(*published: float) -> Verification:
        return judge("model", data, part, published, random_part=True)  # type: ignore[arg-type]

    assert of_part(*measured).verdict == "inconclusive"
    for far in ((measured[0] + 25, measured[1]), (measured[0], measured[1] - 25)):
        found = of_part(*far)
        assert found.verdict == "refuted"
        assert "interval" in found.reason
    # Images that nobody drew at random prove nothing, and neither do very few.
    assert judge("model", data, part, (99.0, 99.0)).verdict == "inconclusive"
    few = judge("model", data, part[:20], (99.0, 99.0), random_part=True)
    assert few.verdict == "inconclusive"
    # Classes that no image of the part has could have any AP.
    unseen = next(one for one in results if one.category_ids).category_ids[0]
    without = [
        one
        for one in results
        if unseen not in next(i for i in data.images if i.image_id == one.image_id).category_ids
    ]
    bounded = judge("model", data, without, measured, random_part=True)
    assert len(bounded.unseen) == 1
    assert bounded.verdict == "inconclusive"


def test_batches_are_a_run_of_their_own_and_give_the_same_digits_after_a_stop(
    small: MaskRCNN, coco: Path, undisturbed: Verification, tmp_path: Path
) -> None:
    with pytest.raises(ZooError, match="batch_size"):
        vitadapter_zoo.verify(small, coco, batch_size=3, run=undisturbed.details["run"])
    whole = vitadapter_zoo.verify(small, coco, batch_size=3, run=tmp_path / "whole")
    assert figures(whole) == pytest.approx(figures(undisturbed), abs=0.5)
    vitadapter_zoo.verify(small, coco, batch_size=3, run=tmp_path / "parts", limit=4)
    parts = vitadapter_zoo.verify(small, coco, batch_size=3, run=tmp_path / "parts")
    assert parts.details["images_before"] == 4
    assert figures(parts) == figures(whole)
    with pytest.raises(ValueError, match="leave batch_size or workers out"):
        vitadapter_zoo.verify(small, coco, batch_size=3, workers=2)


def test_time_runs_out(small: MaskRCNN, coco: Path, tmp_path: Path) -> None:
    found = vitadapter_zoo.verify(
        small, coco, run=tmp_path / "run", max_minutes=1e-3, expected=(50, 50)
    )
    assert found.evaluated < PICTURES
    assert found.verdict == "inconclusive"


def test_a_killed_run_ends_with_the_same_digits(
    folder: Path, coco: Path, undisturbed: Verification, tmp_path: Path
) -> None:
    killed = kill_rounds(folder, coco, undisturbed, tmp_path, rounds=3)
    assert killed > 0


@pytest.mark.slow
def test_fifty_killed_runs_end_with_the_same_digits(
    folder: Path, coco: Path, undisturbed: Verification, tmp_path: Path
) -> None:
    assert kill_rounds(folder, coco, undisturbed, tmp_path, rounds=50) > 25


def kill_rounds(
    folder: Path, coco: Path, undisturbed: Verification, tmp_path: Path, rounds: int
) -> int:
    """Kill a run once at a random moment of its images, let it end; how many were killed."""
    rng = random.Random(1)
    killed = 0
    for round_ in range(rounds):
        run = tmp_path / f"run-{round_}"
        arguments = [*COMMAND, str(folder), "--coco", str(coco), "--run", str(run), "--json"]
        process = subprocess.Popen(
            arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=heed_interrupts,
        )  # fmt: skip
        while process.poll() is None and not (run / PREDICTIONS).exists():
            time.sleep(0.01)
        time.sleep(rng.random() * 1.5)
        if process.poll() is None:
            process.send_signal(rng.choice([signal.SIGKILL, signal.SIGINT]))
            killed += 1
        # Before and after the command's own code Python dies by SIGINT: 130 too, to shells.
        assert process.wait() in (3, -signal.SIGKILL, 130, -signal.SIGINT)
        ended = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert ended.returncode == 3, ended.stderr
        record = json.loads(ended.stdout)
        again = [record[kind]["figures"][name] for kind in KINDS for name in FIGURES]
        assert again == figures(undisturbed)
        assert record["images"]["evaluated"] == PICTURES
        shutil.rmtree(run)
    return killed


def test_a_torn_record_is_done_again(tmp_path: Path) -> None:
    results = [
        ImageResult(key, (4, 5), [[0.0, 1.0, 2.0, 3.5]], [0.25], [7], ["abc"], "00")
        for key in range(3)
    ]
    with open_run(tmp_path, {"a": 1}) as run:
        for result in results:
            run.append(result)
    path = tmp_path / PREDICTIONS
    whole = path.read_bytes()
    last = whole[:-1].rindex(b"\n") + 1
    for end in range(last, len(whole)):
        path.write_bytes(whole[:end])
        with open_run(tmp_path, {"a": 1}) as run:
            assert sorted(run.results) == [0, 1]
            run.append(results[2])
        assert path.read_bytes() == whole
    for place in (3, last + 12):  # a damaged record, wherever it stands
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with open_run(tmp_path, {"a": 1}) as run:
            assert len(run.results) == 2
    with open_run(tmp_path, {"a": 1}) as run:
        assert run.results == {key: results[int(key)] for key in run.results}


def test_results_of_another_run_are_not_mixed(
    small: MaskRCNN,
    coco: Path,
    undisturbed: Verification,
    changed: Callable[[Callable[[dict[str, Any]], None]], Path],
) -> None:
    run = undisturbed.details["run"]
    other = copy.deepcopy(small)
    with torch.no_grad():
        next(other.rpn_head.parameters()).add_(1e-3)
    with pytest.raises(ZooError, match=r"weights_sha256.*another run directory"):
        vitadapter_zoo.verify(other, coco, run=run)

    def shrink(content: dict[str, Any]) -> None:
        content["annotations"].pop()

    with pytest.raises(ZooError, match="annotations_sha256"):
        vitadapter_zoo.verify(small, changed(shrink), run=run)
    with pytest.raises(ZooError, match="precision: 'float32' then, 'bfloat16' now"):
        vitadapter_zoo.verify(copy.deepcopy(small).to(torch.bfloat16), coco, run=run)
    with pytest.raises(ValueError, match="leave checkpoint, device and dtype out"):
        vitadapter_zoo.verify(small, coco, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"set model\.allow_tf32"):
        vitadapter_zoo.verify(small, coco, allow_tf32=True)
    found = command("verify", "adapter-t-deit-3x", "--coco", coco, "--device", "cpu", "--tf32")
    assert found.exit_code == 2
    assert "--tf32 needs --device cuda and --dtype float32" in found.stderr


def test_a_full_disk_keeps_what_is_finished(
    folder: Path, coco: Path, undisturbed: Verification, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    whole = (Path(undisturbed.details["run"]) / PREDICTIONS).stat().st_size
    limited = subprocess.run(
        [
            *("bash", "-c", f'ulimit -f {whole // 2048}; trap "" XFSZ; exec "$@"', "-"),
            *(*COMMAND, str(folder), "--coco", str(coco), "--run", str(run)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert limited.returncode == 2
    assert "cannot write to the run directory" in limited.stderr
    assert "Traceback" not in limited.stderr
    kept = (run / PREDICTIONS).read_bytes()
    assert kept.endswith(b"\n")
    assert 0 < kept.count(b"\n") < PICTURES
    again = command("verify", folder, "--coco", coco, "--run", run, "--json")
    record = json.loads(again.stdout)
    assert record["images_before"] == kept.count(b"\n")
    assert record["mask"]["figures"] == undisturbed.mask.figures


def remove_picture(root: Path) -> Path:
    path = min((root / "val2017").iterdir())
    path.unlink()
    return path


def spoil_picture(root: Path) -> Path:
    path = min((root / "val2017").iterdir())
    path.write_bytes(path.read_bytes()[:100])
    return path


@pytest.mark.parametrize("spoil", [remove_picture, spoil_picture])
def test_bad_images_are_named_and_may_be_left_out(
    spoil: Callable[[Path], Path], small: MaskRCNN, coco: Path, tmp_path: Path
) -> None:
    root = tmp_path / "coco"
    shutil.copytree(coco, root)
    path = spoil(root)
    run = tmp_path / "run"
    with pytest.raises(ImageError, match=rf"{path.name}.*--skip-bad-images"):
        vitadapter_zoo.verify(small, root, run=run)
    found = vitadapter_zoo.verify(small, root, run=run, expected=(50, 50), skip_bad_images=True)
    assert found.verdict == "inconclusive"
    assert list(found.skipped) == [int(path.stem)]
    assert path.name in found.skipped[int(path.stem)]
    assert found.evaluated == PICTURES - 1
    # Restored, it is evaluated after all.
    shutil.copy(coco / "val2017" / path.name, path)
    assert vitadapter_zoo.verify(small, root, run=run).skipped == {}


def drop_masks(content: dict[str, Any]) -> None:
    for annotation in content["annotations"]:
        del annotation["segmentation"]


def add_background(content: dict[str, Any]) -> None:
    content["categories"].insert(0, {"id": 0, "name": "background"})


def repeat_image(content: dict[str, Any]) -> None:
    content["images"].append(content["images"][0])


def orphan(content: dict[str, Any]) -> None:
    content["annotations"][0]["image_id"] = 999_999


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("annotations"), "holds no annotations.*instances_val2017"),
        (drop_masks, "has no mask"),
        (add_background, "81 classes and the model 80.*'background'"),
        (repeat_image, "twice"),
        (orphan, "cut or edited"),
        (lambda content: content.pop("categories"), "not in COCO's instances format"),
        (lambda content: content["images"][0].update(width=999), "belongs to another data set"),
    ],
)
def test_wrong_data_are_told_apart(
    change: Callable[[dict[str, Any]], None],
    message: str,
    small: MaskRCNN,
    changed: Callable[[Callable[[dict[str, Any]], None]], Path],
) -> None:
    root = changed(change)
    with pytest.raises((DatasetError, ImageError), match=message):
        vitadapter_zoo.verify(small, root)


def test_what_is_no_coco_folder_is_told(small: MaskRCNN, coco: Path, tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    shutil.copy(annotation_file(coco), tmp_path / "annotations" / "instances_val2014.json")
    with pytest.raises(DatasetError, match=r"instances_val2014\.json.*val2017"):
        vitadapter_zoo.verify(small, tmp_path)
    truncated = annotation_file(tmp_path)
    truncated.write_bytes(annotation_file(coco).read_bytes()[:1000])
    (tmp_path / "val2017").mkdir()
    with pytest.raises(DatasetError, match=r"not JSON.*truncated"):
        vitadapter_zoo.verify(small, tmp_path)


def test_a_model_on_classes_of_its_own(small: MaskRCNN, coco: Path, tmp_path: Path) -> None:
    """Class names decide, whatever the ids and their order are."""
    content = json.loads(annotation_file(coco).read_text())
    renumbered = {one["id"]: 500 - 3 * one["id"] for one in content["categories"]}
    for one in content["categories"]:
        one["name"] = f"my {one['name']}"
        one["id"] = renumbered[one["id"]]
    content["categories"].reverse()
    for one in content["annotations"]:
        one["category_id"] = renumbered[one["category_id"]]
    path = tmp_path / "own.json"
    path.write_text(json.dumps(content))
    own = copy.deepcopy(small)
    own.categories = tuple(f"my {name}" for name in small.categories)
    data = read_dataset(path, coco / "val2017")
    with pytest.raises(DatasetError, match="only the model has 'person'"):
        vitadapter_zoo.verify(small, data)
    found = vitadapter_zoo.verify(own, data)
    reference = vitadapter_zoo.verify(small, coco)
    assert found.mask.ap == pytest.approx(reference.mask.ap, abs=1e-12)


def test_the_command(folder: Path, coco: Path, undisturbed: Verification, tmp_path: Path) -> None:
    run = undisturbed.details["run"]
    box, mask = (f"{one.measured:.1f}" for one in undisturbed.comparisons)
    base = ["verify", folder, "--coco", coco, "--run", run]
    arguments = [*COMMAND, *map(str, base[1:]), "--expect", box, mask]
    confirmed = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (confirmed.returncode, confirmed.stderr) == (0, "")
    assert "confirmed" in confirmed.stdout
    assert box in confirmed.stdout
    assert command(*base, "--expect", 1, 1).exit_code == 1
    assert command(*base, "--limit", "3", "--expect", box, mask).exit_code == 3
    absent = command("verify", folder, "--coco", tmp_path)
    assert absent.exit_code == 2
    assert "instances_val2017.json is not there" in absent.stderr
    assert "Traceback" not in absent.stderr
    both = command(
        "verify", folder, "--annotations", annotation_file(coco), "--images", coco / "val2017",
        "--limit", "2", "--run", run, "--json",
    )  # fmt: skip
    assert json.loads(both.stdout)["images"]["evaluated"] == 2
    assert command("verify", folder, "--limit", "3").exit_code == 2
    assert command("verify", "adapter-x", "--coco", coco).exit_code == 2


def test_a_row_with_data_in_the_package_needs_no_option(tmp_path: Path) -> None:
    found = command("verify", "adapter-n-emoji", "--limit", "2", "--run", tmp_path, "--json")
    assert found.exit_code == 3, found.output
    record = json.loads(found.stdout)
    row = get_row("adapter-n-emoji")
    assert record["annotations"].endswith("data/emoji/annotations/instances_val.json")
    assert record["comparisons"]["box"]["published"] == row.box_ap
    assert record["comparisons"]["mask"]["published"] == row.mask_ap
    assert (record["images"]["evaluated"], record["images"]["total"]) == (2, 200)
    assert "give either --coco DIR" in command("verify", "vit-t-deit-3x").stderr


def test_the_old_meaning_of_images_is_refused(folder: Path, coco: Path) -> None:
    """``--images 200`` was the number of images before ``--limit``."""
    own: list[str | Path] = ["--annotations", annotation_file(coco), "--images", coco]
    for arguments in (["--coco", coco], own):
        found = command("verify", folder, *arguments, "--images", "200")
        assert found.exit_code == 2
        assert "write --limit 200" in found.stderr
    assert command("verify", folder, "--coco", coco, "--limit", "0").exit_code == 2
    for values in (("nan", "nan"), ("41", "101"), ("-1", "41"), ("inf", "41")):
        found = command("verify", folder, "--coco", coco, "--expect", *values)
        assert found.exit_code == 2
        assert "0..100" in found.stderr
    assert "goes with --annotations" in command(
        "verify", folder, "--coco", coco, "--images", coco
    ).stderr  # fmt: skip


def test_with_expect_nothing_is_called_published(
    folder: Path, coco: Path, undisturbed: Verification, tmp_path: Path
) -> None:
    run = undisturbed.details["run"]
    box, mask = (round(one.measured, 1) for one in undisturbed.comparisons)
    found = command(
        *("verify", folder, "--coco", coco, "--expect", box + 30, round(mask - 0.5, 1)),
        *("--report", tmp_path / "report", "--run", run),
    )
    assert found.exit_code == 1
    reason = (
        f"box AP is 30.0 below the expected {box + 30:.1f} and mask AP is 0.5 above the expected "
        f"{mask - 0.5:.1f}"
    )
    assert reason in found.stdout
    assert "expected" in found.stdout.partition("difference")[0]
    page = (tmp_path / "report" / "report.html").read_text()
    text = page.partition("</h1>")[2].partition("<h2>To repeat this</h2>")[0]
    text = re.sub("<[^>]*>", "", text)
    assert reason in text
    assert "published" not in found.stdout + text
    equal = command("verify", folder, "--coco", coco, "--run", run, "--expect", box, mask)
    assert "both are within 0.1 of the expected values" in equal.stdout
    assert "published" not in equal.stdout
    part = command(
        "verify", folder, "--coco", coco, "--run", run, "--expect", box, mask, "--limit", "4"
    )
    assert part.exit_code == 3
    assert "published" not in part.stdout


def test_images_annotated_without_their_exif_rotation(
    small: MaskRCNN, coco: Path, undisturbed: Verification, tmp_path: Path
) -> None:
    """Stored on its side and annotated that way, with EXIF data that would turn it upright."""
    root = tmp_path / "coco"
    shutil.copytree(coco, root)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # orientation: to show it, rotate it by 90 degrees
    content = exif.tobytes()
    segment = b"\xff\xe1" + (len(content) + 2).to_bytes(2, "big") + content
    for path in (root / "val2017").iterdir():
        jpeg = path.read_bytes()
        path.write_bytes(jpeg[:2] + segment + jpeg[2:])
    with pytest.raises(ImageError, match=r"EXIF data rotate it.*--ignore-exif"):
        vitadapter_zoo.verify(small, root)
    data = read_dataset(annotation_file(root), root / "val2017", ignore_exif=True)
    found = vitadapter_zoo.verify(small, data)
    assert figures(found) == figures(undisturbed)
    assert found.details["identity"]["exif"] == "ignored"
    report.write(found, tmp_path / "report")
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    page = (tmp_path / "report" / "report.html").read_text()
    assert content["worst_images"]
    assert "No picture" not in page
    with pytest.raises(ValueError, match="mmdet"):
        vitadapter_zoo.verify(small, data, backend="mmdet")


def test_exchanged_sides_without_exif_are_told_apart(
    small: MaskRCNN, changed: Callable[[Callable[[dict[str, Any]], None]], Path]
) -> None:
    def exchange(content: dict[str, Any]) -> None:
        for image in content["images"]:
            image["width"], image["height"] = image["height"], image["width"]
        del content["annotations"][1:]
        image = next(
            one for one in content["images"] if one["id"] == content["annotations"][0]["image_id"]
        )
        content["annotations"][0]["segmentation"] = [[0, 0, 9, 0, 9, 9]]

    with pytest.raises(ImageError, match="height and width are exchanged"):
        vitadapter_zoo.verify(small, changed(exchange))


def test_results_from_elsewhere_are_judged(
    coco: Path, undisturbed: Verification, tmp_path: Path
) -> None:
    path = tmp_path / "results.json"
    detections = [one for result in undisturbed.results for one in result.to_coco()]
    path.write_text(json.dumps(detections))
    arguments: list[str | float | Path] = [
        "score",
        path,
        "--coco",
        coco,
        "--model",
        "adapter-t-deit-3x",
        "--json",
    ]
    found = command(*arguments)
    assert found.exit_code == 3
    record = json.loads(found.stdout)
    assert record["box"]["figures"] == undisturbed.box.figures
    assert record["mask"]["figures"] == undisturbed.mask.figures

    def refused(content: Any) -> str:
        path.write_text(json.dumps(content))
        found = command(*arguments)
        assert found.exit_code == 2
        assert "Traceback" not in found.stderr
        return found.stderr

    assert "another data set" in refused([{**detections[0], "image_id": 1}])
    assert "category ids" in refused([{**detections[0], "category_id": 12}])
    assert "result format" in refused({"annotations": []})
    assert "compressed RLE" in refused([{**detections[0], "segmentation": [[1, 2, 3, 4]]}])


def test_every_beginning_of_the_sampling_order_is_stratified(coco: Path) -> None:
    data = read_dataset(annotation_file(coco), coco / "val2017")
    classes = [frozenset({1}), frozenset({1, 2}), frozenset[int]()]
    images = tuple(
        Image(key, Path(f"{key}.jpg"), (1, 1), classes[0 if key < 60 else 1 if key < 90 else 2])
        for key in range(100)
    )
    many = dataclasses.replace(data, images=images)
    order = sampling_order(many, seed=3)
    assert sorted(one.image_id for one in order) == list(range(100))
    assert order == sampling_order(many, seed=3)
    assert order != sampling_order(many, seed=4)
    for count in (10, 20, 50, 90):
        share = [sum(one.category_ids == kind for one in order[:count]) for kind in classes]
        expected = [0.6 * count, 0.3 * count, 0.1 * count]
        assert all(abs(a - b) <= 2 for a, b in zip(share, expected, strict=True))
    # Over many seeds every image is equally often among the first ten.
    times = np.zeros(100)
    for seed in range(2000):
        for one in sampling_order(many, seed)[:10]:
            times[int(one.image_id)] += 1
    assert np.abs(times / 2000 - 0.1).max() < 0.03


def test_no_process_of_another_user_is_waited_for(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", {}):
        code = (
            "import sys; from pathlib import Path\n"
            "from vitadapter_zoo.evaluation.run import open_run\n"
            "with open_run(Path(sys.argv[1]), {}): pass"
        )
        other = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "run")],
            capture_output=True, text=True, check=False, env=os.environ,
        )  # fmt: skip
    assert "in use by another process" in other.stderr
