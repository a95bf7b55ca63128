"""Draw docs/detections.png: validation images with what adapter-n-emoji finds in them.

The README and the model card begin with it. Run it again when the weights change:

    python scripts/make_picture.py
"""

import io
from pathlib import Path

from PIL import Image

import vitadapter_zoo
from vitadapter_zoo import MaskRCNN, get_row

MODEL = "adapter-n-emoji"
# Names of validation images by rows of the picture. They are chosen by eye.
ROWS = (
    ("000190", "000197", "000054"),
    ("000096", "000194", "000133"),
)
SCORE = 0.5  # lowest that is drawn
WIDTH = 960  # pixels, about what a README shows
GAP = 6  # pixels between images
LIMIT = 300_000  # bytes
TARGET = Path(__file__).parents[1] / "docs" / "detections.png"


def grid(model: MaskRCNN, folder: Path) -> Image.Image:
    """The picture: rows of equal width, in each of which the images have the same height."""
    lines = [line(model, [folder / f"{name}.jpg" for name in names]) for names in ROWS]
    height = sum(one.height for one in lines) + GAP * (len(lines) - 1)
    picture = Image.new("RGB", (WIDTH, height), "white")
    top = 0
    for one in lines:
        picture.paste(one, (0, top))
        top += one.height + GAP
    return picture


def line(model: MaskRCNN, paths: list[Path]) -> Image.Image:
    """One row of the picture."""
    images = [Image.open(path).convert("RGB") for path in paths]
    room = WIDTH - GAP * (len(images) - 1)
    height = round(room / sum(image.width / image.height for image in images))
    row = Image.new("RGB", (WIDTH, height), "white")
    left = 0
    for number, image in enumerate(images, 1):
        # The last one takes what rounding has left.
        last = number == len(images)
        width = WIDTH - left if last else round(image.width / image.height * height)
        found = model.predict(image, SCORE)[0].resized(height, width)
        row.paste(found.draw(image.resize((width, height), Image.Resampling.LANCZOS)), (left, 0))
        left += width + GAP
    return row


def encoded(picture: Image.Image) -> bytes:
    """The picture as PNG of at most ``LIMIT`` bytes, with as many colours as that allows."""
    for colors in (256, 192, 128, 96, 64):
        buffer = io.BytesIO()
        reduced = picture.quantize(colors, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        reduced.save(buffer, "PNG", optimize=True)
        if len(buffer.getvalue()) <= LIMIT:
            return buffer.getvalue()
    raise SystemExit(f"more than {LIMIT} bytes with {colors} colours: choose fewer images")


def main() -> None:
    """Write the picture."""
    files = get_row(MODEL).data_files
    assert files is not None  # noqa: S101  the row has its images in the package
    content = encoded(grid(vitadapter_zoo.load(MODEL, offline=True), files[1]))
    TARGET.write_bytes(content)
    print(f"{TARGET}: {len(content):,} bytes")


if __name__ == "__main__":
    main()
