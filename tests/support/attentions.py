"""Deformable attentions of other projects with random weights, and their inputs."""

from typing import Any

import detectors
import torch
from torch import Tensor, nn


def randomised(model: nn.Module) -> nn.Module:
    """Give every parameter random values; new attentions have the same offsets at all queries."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            inputs = parameter.shape[1:].numel() if parameter.dim() else 1
            parameter.add_(noise * 0.2 / inputs**0.5)
    return model.eval()


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomised(detectors.FAMILIES[name].build())


def tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of a module's output."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    found = output.values() if isinstance(output, dict) else output
    parts = [] if found is None or isinstance(found, (bool, int, str)) else list(found)
    return [tensor for part in parts for tensor in tensors(part)]


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    if torch.equal(got, expected):  # infinities too
        return
    finite = expected.isfinite()
    assert torch.equal(finite, got.isfinite())
    worst = (got - expected)[finite].abs().max() / expected[finite].abs().max()
    assert worst <= tolerance, float(worst)


class Recorded:
    """A family's first attention and the arguments with which its model calls it."""

    def __init__(self, name: str) -> None:
        model = built(name)
        holders = [module for module in model.modules() if hasattr(module, "sampling_offsets")]
        self.module = holders[0]
        self.calls: list[tuple[Any, Any]] = []
        handle = self.module.register_forward_pre_hook(
            lambda _module, given, named: self.calls.append((given, named)), with_kwargs=True
        )
        with torch.no_grad():
            model(**detectors.FAMILIES[name].inputs())
        handle.remove()

    def __call__(self, module: nn.Module) -> Tensor:
        given, named = self.calls[0]
        output = module(*given, **named)
        return output if isinstance(output, Tensor) else output[0]


def authors_arguments(coordinates: int, *, shared: bool = False) -> tuple[Tensor, ...]:
    """Arguments of ``MSDeformAttn``: two images, three levels, 9 queries."""
    generator = torch.Generator().manual_seed(3)
    shapes = torch.tensor([[8, 6], [4, 3], [2, 2]])
    areas = shapes.prod(1)
    pixels = int(areas.sum())
    size = (1, 9, 1, coordinates) if shared else (2, 9, 3, coordinates)
    return (
        torch.randn(2, 9, 64, generator=generator),
        torch.rand(size, generator=generator),
        torch.randn(2, pixels, 64, generator=generator),
        shapes,
        areas.cumsum(0) - areas,
        torch.rand(2, pixels, generator=generator) > 0.8,
    )
