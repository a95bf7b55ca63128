"""``predict`` on the command line: its outputs, and that it never overwrites an input."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import pytest
import scenes
import standins
from forked import failure, run
from hotcoco import mask as coco_mask
from PIL import Image

from vitadapter_zoo import get_row
from vitadapter_zoo.cli.predict_output import image_ids
from vitadapter_zoo.images import read_image


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with two pictures, PNG and JPEG."""
    folder = tmp_path / "pictures"
    scenes.draw_pictures(folder, 2)
    Image.open(folder / "000000000003.jpg").save(folder / "photo.png")
    return folder


def lines(*arguments: str, cwd: Path | None = None) -> list[dict[str, Any]]:
    """Run ``predict --json`` and return its lines."""
    done = run("predict", *arguments, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_predict_writes_overlays_and_json(
    published_file: Callable[[str], Path], tmp_path: Path
) -> None:
    other = tmp_path / "other" / "rocket.jpg"
    other.parent.mkdir()
    shutil.copy(standins.PHOTO, other)
    weights = str(published_file("adapter-t-deit-3x"))
    arguments = [
        *("--model", "adapter-t-deit-3x"),
        *("--checkpoint", weights),
        *("--out", str(tmp_path / "out")),
    ]
    first, second = lines(str(standins.PHOTO), str(other), *arguments)
    overlays = [Path(item["overlay"]).name for item in (first, second)]
    assert overlays == ["rocket.png", "rocket-2.png"]
    assert first["detections"]
    assert {found["score"] >= 0.3 for found in first["detections"]} == {True}
    drawn = Image.open(first["overlay"])
    assert drawn.size == (640, 427)
    assert drawn.tobytes() != Image.open(standins.PHOTO).tobytes()
    listed = run("predict", str(standins.PHOTO), *arguments, "--score", "0.99").stdout
    assert f"{standins.PHOTO}: " in listed


def test_errors_are_one_line_without_traceback(tmp_path: Path) -> None:
    photo = str(standins.PHOTO)
    assert "did you mean vit-s-deit-3x" in failure("predict", photo, "--model", "vit-s-deit")
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    assert "is not an image" in failure("predict", str(text), "--model", "adapter-n-emoji")
    missing = ["--model", "vit-t-deit-3x", "--checkpoint", str(tmp_path / "none.pth")]
    assert "there is no checkpoint file" in failure("predict", photo, *missing)
    device = ["--model", "adapter-n-emoji", "--device", "nonsense"]
    assert "cannot be used here" in failure("predict", photo, *device)


def test_a_folder_of_pictures_with_a_saved_model(folder: Path, pictures: Path) -> None:
    found = lines(str(pictures), "--model", str(folder), "--score", "0.01", cwd=pictures.parent)
    assert [Path(one["image"]).name for one in found] == [
        "000000000003.jpg", "000000000010.jpg", "photo.png",
    ]  # fmt: skip
    for one in found:
        rgb = read_image(one["image"])
        assert one["size"] == list(rgb.shape[:2])
        assert read_image(pictures.parent / one["overlay"]).shape == rgb.shape
        best = one["detections"][0]
        assert best["score"] == max(row["score"] for row in one["detections"])
        assert coco_mask.decode(best["segmentation"]).shape == rgb.shape[:2]


def test_an_input_is_never_replaced(folder: Path, pictures: Path) -> None:
    (pictures / "link.png").symlink_to(pictures / "photo.png")
    (pictures / "sub").mkdir()
    (pictures / "sub" / "PHOTO.jpg").write_bytes((pictures / "000000000003.jpg").read_bytes())
    (pictures / "out").symlink_to(pictures)
    os.link(pictures / "photo.png", pictures / "hard.png")
    before = {path: path.read_bytes() for path in pictures.rglob("*.*g") if path.is_file()}
    written = set()
    for out in (".", "out", str(pictures), "sub/.."):
        arguments = ["photo.png", "link.png", "hard.png", "sub/PHOTO.jpg", "--out", out]
        found = lines(*arguments, "--model", str(folder), cwd=pictures)
        names = [(pictures / one["overlay"]).resolve() for one in found]
        assert len({str(name).casefold() for name in names}) == 4
        written |= set(names)
    assert {path: path.read_bytes() for path in before} == before
    assert not written & {path.resolve() for path in before}


def test_other_outputs_never_replace_an_input_nor_each_other(
    folder: Path, pictures: Path, tmp_path: Path
) -> None:
    model = ["--model", str(folder)]
    picture = pictures / "photo.png"
    before = picture.read_bytes()
    (tmp_path / "link.json").symlink_to(picture)
    for target in (picture, tmp_path / "link.json"):
        text = failure("predict", str(picture), *model, "--coco-json", str(target))
        assert "which is never replaced" in text
    weights = folder / "model.safetensors"
    text = failure(
        *("predict", str(picture), "--model", "vit-t-deit-3x", "--checkpoint", str(weights)),
        *("--coco-json", str(weights)),
    )
    assert "which is never replaced" in text
    for name in ("config.json", "model.safetensors"):  # of the model's folder
        text = failure("predict", str(picture), *model, "--coco-json", str(folder / name))
        assert "which is never replaced" in text
    assert "is a folder" in failure("predict", str(picture), *model, "--coco-json", str(folder))
    (found,) = lines(
        *(str(picture), *model, "--coco-json", str(tmp_path / "photo.png"), "--out", str(tmp_path))
    )
    assert Path(found["overlay"]).name == "photo-2.png"
    assert json.loads((tmp_path / "photo.png").read_text()) == []
    assert picture.read_bytes() == before


def test_paths_in_the_home_folder(folder: Path, pictures: Path) -> None:
    os.environ["HOME"], before = str(pictures), os.environ.get("HOME", "")
    try:
        arguments = ("~/photo.png", "--model", str(folder), "--out=~/found")
        (found,) = lines(*arguments, "--coco-json=~/results.json", cwd=pictures.parent)
    finally:
        os.environ["HOME"] = before
    assert found["overlay"] == str(pictures / "found" / "photo.png")
    assert (pictures / "results.json").exists()
    assert not (pictures.parent / "~").exists()


def test_coco_results(folder: Path, pictures: Path, tmp_path: Path) -> None:
    results = tmp_path / "new" / "results.json"
    arguments = ("--model", str(folder), "--score", "0.01", "--coco-json", str(results))
    done = run("predict", f"{pictures}/0*.jpg", *arguments, "--batch-size", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(results.read_text())
    assert {row["image_id"] for row in rows} == {3, 10}
    assert all(1 <= row["category_id"] <= 90 for row in rows)
    assert f"{pictures}/000000000003.jpg: " in done.stdout
    assert image_ids(["a/12.jpg", "b/012.jpg"]) is None  # one number twice
    assert image_ids(["a/12.jpg", "b.jpg"]) is None
    assert image_ids([0]) is None


def test_a_video(folder: Path, tmp_path: Path) -> None:
    video = scenes.make_video(tmp_path / "clip.mp4", 9)
    before = video.read_bytes()
    model = ["--model", str(folder), "--score", "0.001"]
    found = lines("clip.mp4", *model, "--stride", "2", "--out", ".", cwd=tmp_path)
    assert [one["frame"] for one in found] == [0, 2, 4, 6, 8]
    assert {(one["image"], one["overlay"]) for one in found} == {("clip.mp4", "clip-2.mp4")}
    drawn = cv2.VideoCapture(str(tmp_path / "clip-2.mp4"))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 5
    assert drawn.get(cv2.CAP_PROP_FPS) == pytest.approx(5)
    assert video.read_bytes() == before
    done = run("predict", "clip.mp4", *model, "--max-frames", "3", cwd=tmp_path)
    assert done.stdout.startswith("clip.mp4: 3 frames, ")
    assert "drawn in predictions/clip.mp4" in done.stdout
    assert sorted(path.name for path in tmp_path.rglob("*.mp4")) == [
        "clip-2.mp4", "clip.mp4", "clip.mp4",
    ]  # fmt: skip


def test_nothing_that_scores_enough_is_said(folder: Path, pictures: Path, tmp_path: Path) -> None:
    arguments = (str(pictures / "photo.png"), "--model", str(folder), "--score", "1")
    done = run("predict", *arguments, cwd=tmp_path)
    assert done.returncode == 0
    assert "photo.png: no detection scored 1 or more; a lower --score shows" in done.stdout
    done = run("predict", *arguments, "--json", cwd=tmp_path)
    assert "a lower --score" in done.stderr
    assert json.loads(done.stdout)["detections"] == []


def test_more_errors_are_one_line(folder: Path, pictures: Path, tmp_path: Path) -> None:
    photo, model = str(pictures / "photo.png"), ["--model", str(folder)]
    (tmp_path / "empty").mkdir()
    assert "has no pictures" in failure("predict", str(tmp_path / "empty"), *model)
    assert "no file fits the pattern" in failure("predict", f"{tmp_path}/*.gif", *model)
    text = failure("predict", photo, *model, "--dtype", "float16", "--device", "cpu")
    assert "float16 needs a GPU" in text
    broken = tmp_path / "notes.mp4"
    broken.write_text("hello")
    text = failure("predict", str(broken), *model)
    assert len(text.splitlines()) == 1
    assert "OpenCV cannot decode it" in text
    text = failure("predict", photo, *model, "--out", photo)
    assert "cannot write" in text
    escape = tmp_path / "a\x1b[2Jb.png"
    assert "\x1b" not in failure("predict", str(escape), *model)


def test_predict_warns_that_the_detector_in_the_package_is_not_for_photos(tmp_path: Path) -> None:
    arguments = ("--model", "adapter-n-emoji", "--out", str(tmp_path / "out"))
    assert "detects drawn emoji" in run("predict", str(standins.PHOTO), *arguments).stderr
    files = get_row("adapter-n-emoji").data_files
    assert files
    own = run("predict", str(files[1] / "000190.jpg"), *arguments)
    assert (own.returncode, own.stderr) == (0, "")
