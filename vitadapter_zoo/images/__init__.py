"""Images: decode and preprocess them (``images``), find them (``sources``), read videos."""

from vitadapter_zoo.images.images import (
    PAD_MULTIPLE,
    RGB,
    ImageInput,
    NetworkInput,
    is_url,
    network_input,
    padded_side,
    read_image,
    resized_size,
    stored_pixels,
)

__all__ = [
    "PAD_MULTIPLE",
    "RGB",
    "ImageInput",
    "NetworkInput",
    "is_url",
    "network_input",
    "padded_side",
    "read_image",
    "resized_size",
    "stored_pixels",
]
