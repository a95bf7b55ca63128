"""Decode an image and prepare it for the network, exactly as for the published figures.

OpenCV decodes and resizes, as in the original code: Pillow's resize differs by up to 18 grey
levels.
"""

from dataclasses import dataclass
from os import PathLike
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vitadapter_zoo import settings
from vitadapter_zoo.errors import ImageError
from vitadapter_zoo.text import PATH, shown

RGB: TypeAlias = npt.NDArray[np.uint8]
ImageInput: TypeAlias = str | PathLike[str] | bytes | Image.Image | npt.NDArray[np.uint8] | Tensor

PAD_MULTIPLE = 32
LARGEST_DOWNLOAD = 1 << 28  # bytes of an image behind a URL
TIMEOUT = (10, 30)  # seconds to connect, and without any data


@dataclass(frozen=True)
class NetworkInput:
    """One image prepared for the network, and the scales that map boxes back to its pixels.

    Attributes:
        tensor: float32 ``[1, 3, H, W]``, normalised RGB, zero-padded at the bottom and right to
            multiples of 32.
        resized: (height, width) of the resized image without the padding.
        original: (height, width) of the image as given, EXIF rotation applied.
        scale: network pixels per image pixel for (x, y, x, y), rounded to float32.
    """

    tensor: Tensor
    resized: tuple[int, int]
    original: tuple[int, int]
    scale: tuple[float, float, float, float]


def read_image(image: ImageInput) -> RGB:
    """Decode to uint8 RGB ``[H, W, 3]``, EXIF rotation applied, transparency dropped.

    Args:
        image: a path, an http(s) URL, the bytes of an image file, a PIL image, an array (uint8 RGB
            ``[H, W, 3]``, grey ``[H, W]`` or ``[H, W, 1]``, or RGBA ``[H, W, 4]``), or a tensor
            (uint8 RGB ``[3, H, W]``, as torchvision's ``decode_image`` gives it).

    Raises:
        ImageError: not an image, or not one of these forms.
    """
    if isinstance(image, Image.Image):
        return _from_pil(image)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Tensor):
        return _from_tensor(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _decode(bytes(image), "the given bytes")
    if is_url(image):
        return _decode(_download(str(image)), shown(image, PATH))
    if isinstance(image, (str, PathLike)):
        path = settings.expanded(image)
        try:
            encoded = path.read_bytes()
        except OSError as error:
            raise ImageError(
                f"cannot read the image {shown(path, PATH)}: {error.strerror}"
            ) from error
        return _decode(encoded, shown(path, PATH))
    raise ImageError(
        "an image is a path, a URL, bytes, a PIL image, a numpy array or a tensor, not "
        f"{type(image).__name__}"
    )


def is_url(image: object) -> bool:
    """Return whether it is an http or https URL."""
    return isinstance(image, str) and image.lower().startswith(("http://", "https://"))


def _download(url: str) -> bytes:
    import requests

    name = shown(url, PATH)
    if settings.is_offline():
        raise ImageError(f"{name} is not fetched: VITADAPTER_ZOO_OFFLINE is set")
    content = bytearray()
    try:
        with requests.get(url, stream=True, timeout=TIMEOUT) as answer:
            answer.raise_for_status()
            for chunk in answer.iter_content(1 << 16):
                content += chunk
                if len(content) > LARGEST_DOWNLOAD:
                    break
    except requests.HTTPError as error:
        raise ImageError(
            f"cannot fetch the image {name}: the server answers {error.response.status_code}"
        ) from error
    except (requests.RequestException, ValueError) as error:
        raise ImageError(
            f"cannot fetch the image {name}: {_reason(error)}; check the address and the connection"
        ) from error
    if len(content) > LARGEST_DOWNLOAD:
        raise ImageError(f"{name} has more than {LARGEST_DOWNLOAD >> 20} MB, too large for a photo")
    return bytes(content)


def _reason(error: BaseException) -> str:
    """Return the system's reason if there is one; the library's text repeats the whole URL."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.strerror:
            return shown(inner.strerror)
        # urllib3 keeps the cause of its last attempt as an argument or as `reason`.
        nested = (*getattr(inner, "args", ()), getattr(inner, "reason", None))
        inner = next(
            (one for one in nested if isinstance(one, BaseException)),
            inner.__cause__ or inner.__context__,
        )
    return shown(str(error).partition("\n")[0] or type(error).__name__)


def _decode(encoded: bytes, source: str) -> RGB:
    return _decode_with(encoded, source, cv2.IMREAD_COLOR)


def stored_pixels(encoded: bytes) -> RGB:
    """Decode an image file's bytes to uint8 RGB ``[H, W, 3]`` without its EXIF rotation.

    Raises:
        ImageError: not an image.
    """
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    return _decode_with(encoded, "the given bytes", flags)


def _decode_with(encoded: bytes, source: str, flags: int) -> RGB:
    reason = "the data are empty" if not encoded else "OpenCV does not know its format"
    try:
        bgr = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags) if encoded else None
    except cv2.error as error:  # more pixels than OpenCV allows, for instance
        bgr, reason = None, str(error.err)
    if bgr is None:
        raise ImageError(
            f"{source} is not an image that can be decoded ({reason}); "
            "JPEG, PNG, WebP, BMP and TIFF can"
        )
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)


def _from_pil(image: Image.Image) -> RGB:
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # convert("RGB") would clip 16 bits to 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ImageError(
                f"a PIL image of mode {image.mode!r} has no fixed range of values; "
                "convert it to 'RGB' or 'L' first"
            )
        return np.asarray(image.convert("RGB"), np.uint8)
    except OSError as error:  # PIL reads lazily: a truncated file shows here
        raise ImageError(f"the PIL image cannot be read: {error}") from error


def _from_array(array: npt.NDArray[np.uint8]) -> RGB:
    if array.dtype != np.uint8:
        raise ImageError(
            f"an image array is uint8 RGB in 0..255, not {array.dtype}; multiply 0..1 by 255 and "
            "convert it with .astype(np.uint8)"
        )
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.size == 0:
        raise ImageError(
            "an image array is [height, width, 3] (RGB), [height, width, 4] (RGBA) or "
            f"[height, width] (grey), not {list(array.shape)}; give several images as a list"
        )
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array[:, :, :3]


def _from_tensor(tensor: Tensor) -> RGB:
    if tensor.dtype != torch.uint8:
        raise ImageError(
            f"an image tensor is uint8 RGB in 0..255, not {tensor.dtype}; multiply 0..1 by 255 and "
            "convert it with .to(torch.uint8)"
        )
    if tensor.dim() != 3 or tensor.shape[0] != 3 or tensor.numel() == 0:
        raise ImageError(
            f"an image tensor is [3, height, width] (RGB), not {list(tensor.shape)}; give several "
            "images as a list"
        )
    return np.ascontiguousarray(tensor.detach().cpu().permute(1, 2, 0).numpy())


def resized_size(height: int, width: int, input_size: tuple[int, int]) -> tuple[int, int]:
    """Compute the (height, width) that an image is resized to, with its aspect ratio kept.

    ``input_size`` is (longest, shortest): the image is made as large as fits both limits.
    """
    longest, shortest = input_size
    factor = min(longest / max(height, width), shortest / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


def padded_side(side: int) -> int:
    """Return the side of the zero-padded input for a resized image's side, both in pixels."""
    return side + -side % PAD_MULTIPLE


def network_input(
    image: ImageInput,
    input_size: tuple[int, int],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> NetworkInput:
    """Decode, resize, normalise and pad one image.

    Args:
        image: see ``read_image``.
        input_size: (longest, shortest) side in pixels after resizing.
        mean: RGB mean, 0..255.
        std: RGB standard deviation, 0..255.

    Raises:
        ImageError: not an image, or so elongated that a side would shrink to nothing.
    """
    rgb = read_image(image)
    height, width = rgb.shape[:2]
    new_height, new_width = resized_size(height, width, input_size)
    if min(new_height, new_width) < 1:
        raise ImageError(
            f"an image of {width} x {height} pixels is too elongated: resized to fit "
            f"{input_size[0]} x {input_size[1]} its short side has no pixel left; crop it first"
        )
    resized = cv2.resize(rgb, (new_width, new_height), interpolation=cv2.INTER_LINEAR)
    pixels = resized.astype(np.float32)
    # OpenCV's own arithmetic, to round as the original did.
    cv2.subtract(pixels, np.array([mean], np.float64), pixels)
    cv2.multiply(pixels, 1 / np.array([std], np.float64), pixels)
    sides = (padded_side(new_height), padded_side(new_width))
    padded = torch.zeros(1, 3, *sides, dtype=torch.float32, device="cpu")
    padded[0, :, :new_height, :new_width] = torch.from_numpy(pixels).permute(2, 0, 1)
    scale_x = float(np.float32(new_width / width))
    scale_y = float(np.float32(new_height / height))
    return NetworkInput(
        tensor=padded,
        resized=(new_height, new_width),
        original=(height, width),
        scale=(scale_x, scale_y, scale_x, scale_y),
    )
