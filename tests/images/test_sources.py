"""What ``predict`` and ``stream`` take: folders, patterns, URLs, videos, tensors."""

import copy
import gc
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import scenes
import standins
import torch
from PIL import Image
from pytest_httpserver import HTTPServer

from vitadapter_zoo import Detections, ImageError, MaskRCNN
from vitadapter_zoo.images import read_image
from vitadapter_zoo.images.sources import expand, is_video, items


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    folder = tmp_path / "shots"
    scenes.draw_pictures(folder, 2)
    (folder / "notes.txt").write_text("no picture")
    (folder / "b.PNG").write_bytes(cv2.imencode(".png", np.zeros((9, 9, 3), np.uint8))[1].tobytes())
    (folder / ".hidden.jpg").write_text("no picture")
    (folder / "more").mkdir()
    scenes.draw_pictures(folder / "more", 1, seed=1)
    return folder


def same(one: Detections, other: Detections) -> bool:
    return torch.equal(one.boxes, other.boxes) and torch.equal(one.masks, other.masks)


def test_folders_and_patterns(shots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["000000000003.jpg", "000000000010.jpg", "b.PNG"]
    assert [Path(str(path)).name for path in expand(shots)] == names
    assert [Path(str(path)).name for path in expand(f"{shots}/*.jpg")] == names[:2]
    assert len(expand(f"{shots}/**/*.jpg")) == 3
    assert len(expand([str(shots), shots / "b.PNG", f"{shots}/b.*"])) == 5
    monkeypatch.setenv("HOME", str(shots.parent))
    assert expand("~/shots") == expand(shots)
    assert expand("~/shots/*.jpg") == expand(f"{shots}/*.jpg")
    odd = shots / "a[1].png"
    odd.write_bytes((shots / "b.PNG").read_bytes())
    assert expand(odd) == [odd]  # a file of that name is no pattern
    with pytest.raises(ImageError, match=r"no file fits the pattern '.*\*\.gif'"):
        expand(f"{shots}/*.gif")
    with pytest.raises(ImageError, match="has no pictures"):
        expand(_empty(shots))


def _empty(shots: Path) -> Path:
    folder = shots / "empty"
    folder.mkdir()
    return folder


def test_predict_takes_a_folder_in_the_order_of_names(small: MaskRCNN, shots: Path) -> None:
    found = small.predict(shots)
    assert [Path(str(one.image)).name for one in found] == [
        path.name
        for path in sorted(
            path
            for path in shots.iterdir()
            if path.suffix in (".jpg", ".PNG") and path.name[0] != "."
        )
    ]
    assert same(found[0], small.predict(expand(shots)[0])[0])
    assert found[0].draw().size == Image.open(str(expand(shots)[0])).size


def test_tensors_as_torchvision_reads_them(small: MaskRCNN) -> None:
    rgb = read_image(standins.PHOTO)
    tensor = torch.from_numpy(rgb.copy()).permute(2, 0, 1)
    np.testing.assert_array_equal(read_image(tensor), rgb)
    assert same(*small.predict([tensor, rgb]))
    for wrong, message in (
        (tensor.float() / 255, r"uint8 RGB in 0..255, not torch\.float32; multiply 0..1 by 255"),
        (tensor[None], r"\[3, height, width\] \(RGB\), not \[1, 3, 427, 640\]; give several"),
        (tensor.permute(1, 2, 0), r"not \[427, 640, 3\]"),
        (tensor[:, :0], r"not \[3, 0, 640\]"),
    ):
        with pytest.raises(ImageError, match=message):
            read_image(wrong)


def test_urls(httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    httpserver.expect_request("/photo.jpg").respond_with_data(standins.PHOTO.read_bytes())
    httpserver.expect_request("/page").respond_with_data("<html>")
    httpserver.expect_request("/broken").respond_with_data("no", status=503)
    url = httpserver.url_for("/photo.jpg")
    np.testing.assert_array_equal(read_image(url), read_image(standins.PHOTO))
    assert expand(f"{url}?size=[1]*") == [f"{url}?size=[1]*"]
    with pytest.raises(ImageError, match="/page is not an image"):
        read_image(httpserver.url_for("/page"))
    with pytest.raises(ImageError, match="the server answers 503"):
        read_image(httpserver.url_for("/broken"))
    refusal = r"cannot fetch the image http://127\.0\.0\.1:9/x\.jpg: Connection refused; check"
    with pytest.raises(ImageError, match=refusal):
        read_image("http://127.0.0.1:9/x.jpg")
    with pytest.raises(ImageError, match="cannot fetch the image http://"):
        read_image("http://")
    monkeypatch.setenv("VITADAPTER_ZOO_OFFLINE", "1")
    with pytest.raises(ImageError, match="VITADAPTER_ZOO_OFFLINE is set"):
        read_image(url)


def test_frames_of_a_video(tmp_path: Path) -> None:
    video = scenes.make_video(tmp_path / "clip.mp4", 8)
    frames = list(items([str(video)]))
    assert [item.frame for item in frames] == list(range(8))
    levels = [int(np.median(np.asarray(item.image))) for item in frames]
    assert levels == pytest.approx([20 * number + 10 for number in range(8)], abs=4)
    assert frames[0].video is not None
    assert frames[0].video.shown_per_second == pytest.approx(10)
    assert frames[3].name == f"{video}, frame 3"
    strided = list(items([video], stride=3))
    assert [item.frame for item in strided] == [0, 3, 6]
    assert strided[0].video is not None
    assert strided[0].video.shown_per_second == pytest.approx(10 / 3)
    assert [item.frame for item in items([video], stride=2, max_frames=2)] == [0, 2]
    for options in ({"stride": 0}, {"max_frames": 0}):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            items([video], **options)


def test_red_is_red_in_a_video(tmp_path: Path) -> None:
    path = tmp_path / "red.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 5, (64, 48))
    writer.write(np.full((48, 64, 3), (0, 0, 250), np.uint8))  # BGR
    writer.release()
    (item,) = items([path])
    assert np.asarray(item.image)[20, 20].tolist() == pytest.approx([250, 0, 0], abs=8)


def test_what_is_no_video(tmp_path: Path) -> None:
    text = tmp_path / "notes.mp4"
    text.write_text("hello")
    with pytest.raises(ImageError, match=r"cannot open .*notes\.mp4: OpenCV cannot decode it"):
        list(items([text]))
    with pytest.raises(ImageError, match=r"cannot read the video gone\.mp4: no such file"):
        list(items(["gone.mp4"]))
    with pytest.raises(ImageError, match="cannot open camera 97: there is none"):
        list(items([97]))
    assert is_video("http://host/clip.MP4?token=1")
    assert is_video("rtsp://host/live")
    assert not is_video(True)
    assert not is_video("clip.jpg")


def test_stream_gives_frames_as_they_come(small: MaskRCNN, tmp_path: Path) -> None:
    video = scenes.make_video(tmp_path / "clip.mp4", 6)
    expected = [small.predict(item.image, 0.01)[0] for item in items([video])]
    for batch_size in (1, 4):
        found = list(small.stream(video, 0.01, batch_size=batch_size))
        assert len(found) == 6
        assert [len(one) for one in found] == [len(one) for one in expected]
    assert same(next(small.stream(video, 0.01)), expected[0])
    shown = next(small.stream(video))
    assert isinstance(shown.image, np.ndarray)
    assert shown.draw().size == (64, 48)
    whole = small.predict(video, 0.01)
    assert len(whole) == 6
    assert whole[0].image is None  # or the whole video would stay in memory
    with pytest.raises(ValueError, match="score_threshold"):
        small.stream(video, 5)
    with pytest.raises(ValueError, match="batch_size"):
        small.stream(video, batch_size=0)
    assert len(list(small.stream(video, stride=4))) == 2


def test_iterators_are_taken_one_image_at_a_time(small: MaskRCNN, shots: Path) -> None:
    paths = expand(shots)
    taken = []

    def given() -> Iterator[Path]:
        for path in paths:
            taken.append(path)
            yield path  # type: ignore[misc]

    expected = small.predict(paths)
    assert [same(*pair) for pair in zip(small.predict(given()), expected, strict=True)]
    taken.clear()
    results = small.stream(given())
    assert taken == []
    assert same(next(results), expected[0])
    assert taken == paths[:1]
    with standins.PHOTO.open("rb") as file, pytest.raises(ImageError, match="not BufferedReader"):
        small.predict(file)


def test_calling_the_model_with_a_single_image_is_explained(small: MaskRCNN) -> None:
    for single in (str(standins.PHOTO), standins.PHOTO, standins.PHOTO.read_bytes()):
        with pytest.raises(ValueError, match=r"model\.predict\(image\) takes a single image"):
            small(single)


def test_stream_keeps_no_frame(small: MaskRCNN, tmp_path: Path) -> None:
    video = scenes.make_video(tmp_path / "clip.mp4", 7)
    alive = []
    for _ in small.stream(video, 0.9):
        arrays = (one for one in gc.get_objects() if isinstance(one, Detections))
        alive.append(sum(isinstance(one.image, np.ndarray) for one in arrays))
    assert max(alive) <= 2


def test_a_model_in_training_mode_stays_so_between_frames(small: MaskRCNN, tmp_path: Path) -> None:
    model = copy.deepcopy(small).train()
    for _ in model.stream(scenes.make_video(tmp_path / "clip.mp4", 2)):
        assert all(module.training for module in model.modules())
