"""Keep float32 computations in float32, whatever other libraries have set for the process."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


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
    with ExitStack() as stack:
        stack.enter_context(float32_by_default())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.autocast("cuda", enabled=False))
        if torch.get_default_device().type != "cpu":  # entering costs time in each later call
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            stack.enter_context(float32_precision(torch.device(kind), allow_tf32=False))
        yield


@contextmanager
def float32_precision(device: torch.device, *, allow_tf32: bool) -> Iterator[None]:
    """Set how float32 matrices are multiplied and convolved, and restore it afterwards.

    On CUDA, PyTorch's default is TF32 in convolutions and float32 in products. TF32 keeps 10 bits
    of the mantissa, which is outside the tolerance within which this package agrees with the
    original. On the CPU, ``torch.set_float32_matmul_precision("medium")`` would give bfloat16. Only
    PyTorch's settings by backend are used here: reading that older setting raises an error if a
    program has used both.

    Args:
        device: where the network computes.
        allow_tf32: on CUDA use TF32 in convolutions and in products.
    """
    if device.type == "cuda":
        settings: tuple[Any, ...] = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    else:
        settings = torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "tf32" if allow_tf32 and device.type == "cuda" else "ieee"
    try:
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def channels_last_weights(model: nn.Module) -> None:
    """Store the weights of convolutions on CUDA in channels-last order, in place.

    The maps are in this order. cuDNN would otherwise convert the weights in every call.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module.weight.is_cuda:
            weight = module.weight.detach()
            module.weight.data = weight.contiguous(memory_format=torch.channels_last)
