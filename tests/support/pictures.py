"""Five test images that cover common errors of image code, made from the reference photo.

Their aspect ratio is three to one. At the network's size they have half the pixels of a photo, so
the tests take half the time.
"""

from pathlib import Path

import standins
from PIL import Image

ORIENTATION = 0x0112  # the EXIF tag
TURNED_RIGHT = 6  # viewers rotate the stored image by 90 degrees clockwise


def make(folder: Path) -> dict[str, Path]:
    """Write the images into ``folder`` and return their paths by name."""
    photo = Image.open(standins.PHOTO)
    wide = photo.crop((60, 150, 360, 250))
    turned = wide.rotate(90, expand=True)
    exif = Image.Exif()
    exif[ORIENTATION] = TURNED_RIGHT
    pictures = {
        "landscape.jpg": (wide, Image.Exif()),
        "portrait.jpg": (photo.crop((200, 20, 325, 395)), Image.Exif()),
        "tiny.png": (photo.crop((300, 300, 345, 315)), Image.Exif()),
        "grey.jpg": (photo.crop((100, 250, 400, 350)).convert("L"), Image.Exif()),
        "rotated.jpg": (turned, exif),
    }
    for name, (picture, tags) in pictures.items():
        picture.save(folder / name, exif=tags)
    return {name.partition(".")[0]: folder / name for name in pictures}
