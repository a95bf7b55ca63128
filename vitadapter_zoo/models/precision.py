"""Whether float32 on CUDA is float32: TF32 is switched off while a detector computes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_precision(device: torch.device, *, allow_tf32: bool) -> Iterator[None]:
    """Set how CUDA multiplies float32 matrices and convolves, and restore it afterwards.

    PyTorch's default is TF32 in convolutions and float32 in products. TF32 keeps 10 bits of the
    mantissa, which is outside the tolerance within which this package agrees with the original.

    Args:
        device: where the network computes; only CUDA devices know TF32.
        allow_tf32: use TF32 in convolutions and in products.
    """
    if device.type != "cuda":
        yield
        return
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = products.fp32_precision, convolutions.fp32_precision
    wanted = "tf32" if allow_tf32 else "ieee"
    products.fp32_precision = convolutions.fp32_precision = wanted
    try:
        yield
    finally:
        products.fp32_precision, convolutions.fp32_precision = before
