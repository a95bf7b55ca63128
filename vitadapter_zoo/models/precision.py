"""Keep float32 computations in float32, whatever other libraries have set for the process."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Make float32 the default dtype within the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def usual_state() -> Iterator[None]:
    """Restore PyTorch's initial global settings within the block.

    Within the block the default dtype is float32 and the default device the CPU, gradients are on,
    nothing is cast automatically, and float32 products are float32.
    """
    precision = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        stack.enter_context(float32_by_default())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.autocast("cuda", enabled=False))
        if torch.get_default_device().type != "cpu":  # entering costs time in each later call
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_float32_matmul_precision, precision)
        torch.set_float32_matmul_precision("highest")
        yield


@contextmanager
def float32_precision(device: torch.device, *, allow_tf32: bool) -> Iterator[None]:
    """Set how float32 matrices are multiplied and convolved, and restore it afterwards.

    On CUDA, PyTorch's default is TF32 in convolutions and float32 in products. TF32 keeps 10 bits
    of the mantissa, which is outside the tolerance within which this package agrees with the
    original. On the CPU, ``torch.set_float32_matmul_precision("medium")`` would give bfloat16.

    Args:
        device: where the network computes.
        allow_tf32: on CUDA use TF32 in convolutions and in products.
    """
    if device.type != "cuda":
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
        return
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = products.fp32_precision, convolutions.fp32_precision
    wanted = "tf32" if allow_tf32 else "ieee"
    products.fp32_precision = convolutions.fp32_precision = wanted
    try:
        yield
    finally:
        products.fp32_precision, convolutions.fp32_precision = before
