"""Images: decoding, resizing and normalising as in the published evaluation."""

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
import standins
import torch
from PIL import Image

from vitadapter_zoo import ImageError, MaskRCNN
from vitadapter_zoo.catalog import HALF, INPUT_SIZE
from vitadapter_zoo.images import ImageInput, network_input, read_image, resized_size

PHOTO = standins.PHOTO


def encoded(image: Image.Image, form: str, exif: Image.Exif | None = None) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **({"exif": exif} if exif else {}))
    return buffer.getvalue()


def test_every_form_of_the_photo_is_the_same_image() -> None:
    expected = read_image(PHOTO)
    assert expected.shape == (427, 640, 3)
    for form in (str(PHOTO), PHOTO.read_bytes(), Image.open(PHOTO), expected):
        np.testing.assert_array_equal(read_image(form), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_to_files_and_pil_images(orientation: int, tmp_path: Path) -> None:
    corner = np.zeros((48, 64, 3), np.uint8)
    corner[:16, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "rotated.jpg"
    path.write_bytes(encoded(Image.fromarray(corner), "JPEG", exif))
    decoded, pil = read_image(path), read_image(Image.open(path))
    assert decoded.shape == ((48, 64, 3) if orientation <= 4 else (64, 48, 3))
    np.testing.assert_array_equal(decoded, pil)
    # Where the bright corner has to be, by the EXIF standard's definition of each orientation.
    bottom = orientation in (3, 4, 7, 8)
    right = orientation in (2, 3, 6, 7)
    assert decoded[-1 if bottom else 0, -1 if right else 0, 0] > 250
    assert (decoded > 128).all(axis=2).sum() == pytest.approx(256, abs=20)


def test_grey_rgba_palette_and_16_bit_images() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    grey = rgb[:, :, 0]
    for image in (
        grey,
        grey[:, :, None],
        Image.fromarray(grey),
        encoded(Image.fromarray(grey), "PNG"),
    ):
        np.testing.assert_array_equal(read_image(image), np.stack([grey] * 3, axis=2))
    rgba = np.dstack([rgb, np.full((20, 30), 7, np.uint8)])
    for image in (rgba, Image.fromarray(rgba), encoded(Image.fromarray(rgba), "PNG")):
        np.testing.assert_array_equal(read_image(image), rgb)  # transparency is dropped
    deep = (grey.astype(np.uint16) << 8) + 5
    png = cv2.imencode(".png", deep)[1].tobytes()
    for image in (png, Image.open(io.BytesIO(png))):
        np.testing.assert_array_equal(read_image(image)[:, :, 0], grey)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((427, 640), (800, 1199)),
        ((640, 427), (1199, 800)),
        ((375, 500), (800, 1067)),
        ((1, 1), (800, 800)),
        ((100, 4000), (33, 1333)),
    ],
)
def test_resized_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized_size(*size, INPUT_SIZE) == expected


@pytest.mark.parametrize("size", [(1, 1), (100, 4000)])
def test_odd_sizes_are_detected_on(small: MaskRCNN, size: tuple[int, int]) -> None:
    detections = small.predict(np.full((*size, 3), 90, np.uint8))[0]
    assert detections.masks.shape == (len(detections), *size)
    height, width = size
    limit = torch.tensor([width, height, width, height]) + 1e-3
    assert ((detections.boxes >= 0) & (detections.boxes <= limit)).all()


def test_the_half_normalisation() -> None:
    prepared = network_input(np.zeros((800, 800, 3), np.uint8), INPUT_SIZE, HALF, HALF)
    assert prepared.tensor.shape == (1, 3, 800, 800)
    assert (prepared.tensor == -1).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("no-such-file.jpg", "cannot read the image no-such-file.jpg: No such file"),
        (b"", "the data are empty"),
        (b"<!DOCTYPE html>", "is not an image"),
        (np.zeros((4, 4, 3), np.float32), "uint8 RGB in 0..255, not float32"),
        (np.zeros((4, 4, 2), np.uint8), r"not \[4, 4, 2\]"),
        (np.zeros((0, 4, 3), np.uint8), r"not \[0, 4, 3\]"),
        (Image.new("F", (4, 4)), "mode 'F'"),
        (np.zeros((1, 30000, 3), np.uint8), "too elongated"),
        (7, "not int"),
    ],
)
def test_what_is_not_an_image_is_said(small: MaskRCNN, image: ImageInput, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        small.predict(image)


def test_a_truncated_png_through_pil(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    path.write_bytes(encoded(Image.open(PHOTO), "PNG")[:50_000])
    with pytest.raises(ImageError, match="cannot be read"):
        read_image(Image.open(path))
