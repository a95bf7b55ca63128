"""``verify`` and ``score`` on the command line."""

import json
import re
from pathlib import Path
from typing import Any

from forked import run as run_in_a_process
from verification import annotation_file, command

from vitadapter_zoo import (
    Verification,
    get_row,
)


def test_the_command(saved: Path, coco: Path, undisturbed: Verification, tmp_path: Path) -> None:
    run = undisturbed.details["run"]
    box, mask = (f"{one.measured:.1f}" for one in undisturbed.comparisons)
    base = ["verify", saved, "--coco", coco, "--run", run]
    confirmed = run_in_a_process(*map(str, base), "--expect", box, mask)
    assert (confirmed.returncode, confirmed.stderr) == (0, "")
    assert "confirmed" in confirmed.stdout
    assert box in confirmed.stdout
    assert command(*base, "--expect", 1, 1).exit_code == 1
    assert command(*base, "--limit", "3", "--expect", box, mask).exit_code == 3
    absent = command("verify", saved, "--coco", tmp_path)
    assert absent.exit_code == 2
    assert "instances_val2017.json is not there" in absent.stderr
    assert "Traceback" not in absent.stderr
    both = command(
        "verify", saved, "--annotations", annotation_file(coco), "--images", coco / "val2017",
        "--limit", "2", "--run", run, "--json",
    )  # fmt: skip
    assert json.loads(both.stdout)["images"]["evaluated"] == 2
    assert command("verify", saved, "--limit", "3").exit_code == 2
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


def test_the_old_meaning_of_images_is_refused(saved: Path, coco: Path) -> None:
    """``--images 200`` was the number of images before ``--limit``."""
    own: list[str | Path] = ["--annotations", annotation_file(coco), "--images", coco]
    for arguments in (["--coco", coco], own):
        found = command("verify", saved, *arguments, "--images", "200")
        assert found.exit_code == 2
        assert "write --limit 200" in found.stderr
    assert command("verify", saved, "--coco", coco, "--limit", "0").exit_code == 2
    for values in (("nan", "nan"), ("41", "101"), ("-1", "41"), ("inf", "41")):
        found = command("verify", saved, "--coco", coco, "--expect", *values)
        assert found.exit_code == 2
        assert "0..100" in found.stderr
    assert "goes with --annotations" in command(
        "verify", saved, "--coco", coco, "--images", coco
    ).stderr  # fmt: skip


def test_with_expect_nothing_is_called_published(
    saved: Path, coco: Path, undisturbed: Verification, tmp_path: Path
) -> None:
    run = undisturbed.details["run"]
    box, mask = (round(one.measured, 1) for one in undisturbed.comparisons)
    found = command(
        *("verify", saved, "--coco", coco, "--expect", round(box - 30, 1), round(mask + 0.5, 1)),
        *("--report", tmp_path / "report", "--run", run),
    )
    assert found.exit_code == 1
    reason = (
        f"box AP is 30.0 above the expected {box - 30:.1f} and mask AP is 0.5 below the expected "
        f"{mask + 0.5:.1f}"
    )
    assert reason in found.stdout
    assert "expected" in found.stdout.partition("difference")[0]
    page = (tmp_path / "report" / "report.html").read_text()
    text = page.partition("</h1>")[2].partition("<h2>To repeat this</h2>")[0]
    text = re.sub("<[^>]*>", "", text)
    assert reason in text
    assert "published" not in found.stdout + text
    equal = command("verify", saved, "--coco", coco, "--run", run, "--expect", box, mask)
    assert "both are within 0.1 of the expected values" in equal.stdout
    assert "published" not in equal.stdout
    part = command(
        "verify", saved, "--coco", coco, "--run", run, "--expect", box, mask, "--limit", "4"
    )
    assert part.exit_code == 3
    assert "published" not in part.stdout


def test_results_from_elsewhere_are_judged(
    saved: Path, coco: Path, undisturbed: Verification, tmp_path: Path
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
        "adapter-n-emoji",
        "--json",
    ]
    found = command(*arguments)
    assert found.exit_code == 3
    record = json.loads(found.stdout)
    assert record["box"]["figures"] == undisturbed.box.figures
    assert record["mask"]["figures"] == undisturbed.mask.figures

    box, mask = (round(one.measured, 1) for one in undisturbed.comparisons)
    of_folder = command("score", path, "--coco", coco, "--model", saved, "--expect", box, mask)
    assert of_folder.exit_code == 0
    assert "both are within 0.1 of the expected values" in of_folder.stdout

    def refused(content: Any) -> str:
        path.write_text(json.dumps(content))
        found = command(*arguments)
        assert found.exit_code == 2
        assert "Traceback" not in found.stderr
        return found.stderr

    assert "another data set" in refused([{**detections[0], "image_id": 999_999}])
    assert "category ids" in refused([{**detections[0], "category_id": 12}])
    assert "result format" in refused({"annotations": []})
    assert "compressed RLE" in refused([{**detections[0], "segmentation": [[1, 2, 3, 4]]}])
