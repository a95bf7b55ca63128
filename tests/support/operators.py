"""Inputs of the deformable-attention operator for tests, and selecting its implementation."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from vitadapter_zoo.ops.library import implementation

Arguments = tuple[Tensor, Tensor, Tensor, Tensor]


def random_arguments(
    seed: int,
    shapes: Sequence[tuple[int, int]],
    *,
    batch: int = 1,
    queries: int = 5,
    heads: int = 2,
    channels: int = 32,
    points: int = 4,
    dtype: torch.dtype = torch.float32,
) -> Arguments:
    """Create value, spatial shapes, locations and weights.

    Some locations are on the border of the map or outside of it.
    """
    generator = torch.Generator().manual_seed(seed)
    pixels = sum(height * width for height, width in shapes)
    value = torch.randn(batch, pixels, heads, channels, generator=generator).to(dtype)
    grouped = (batch, queries, heads, len(shapes), points)
    locations = torch.randn(*grouped, 2, generator=generator) + 0.5
    chance = torch.rand(locations.shape, generator=generator)
    locations[chance < 0.1] = 1.0
    locations[chance > 0.9] = 0.0
    if dtype == torch.float64:
        locations = locations.double()
    weights = torch.rand(grouped, generator=generator).to(dtype)
    return value, torch.tensor(shapes).view(-1, 2), locations, weights


def requiring_gradients(arguments: Arguments) -> Arguments:
    value, shapes, locations, weights = arguments
    return (
        value.clone().requires_grad_(),
        shapes,
        locations.clone().requires_grad_(),
        weights.clone().requires_grad_(),
    )


@contextmanager
def switched_to(choice: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set ``VITADAPTER_ZOO_OP`` to "compiled" or "reference", as for a new process."""
    with monkeypatch.context() as patch:
        patch.setenv("VITADAPTER_ZOO_OP", choice)
        implementation.cache_clear()
        assert implementation("cpu").compiled == (choice == "compiled")
        yield
    implementation.cache_clear()
