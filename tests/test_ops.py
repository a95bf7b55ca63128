import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitadapter_zoo.ops import ms_deform_attn


def by_hand(
    value: torch.Tensor,
    shapes: list[tuple[int, int]],
    locations: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Equation 3 of Deformable DETR as plain loops in float64."""
    n, _, heads, channels = value.shape
    queries = locations.shape[1]
    result = np.zeros((n, queries, heads, channels))
    v, loc, w = value.double().numpy(), locations.double().numpy(), weights.double().numpy()
    for index in np.ndindex(weights.shape):
        image, query, head, level, _ = index
        height, width = shapes[level]
        start = sum(h * w for h, w in shapes[:level])
        x, y = loc[index] * (width, height) - 0.5
        for row in (int(np.floor(y)), int(np.floor(y)) + 1):
            for column in (int(np.floor(x)), int(np.floor(x)) + 1):
                if 0 <= row < height and 0 <= column < width:
                    share = (1 - abs(y - row)) * (1 - abs(x - column))
                    pixel = v[image, start + row * width + column, head]
                    result[image, query, head] += w[index] * share * pixel
    return torch.from_numpy(result.reshape(n, queries, heads * channels))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 2),
    queries=st.integers(0, 5),
    heads=st.integers(1, 3),
    channels=st.integers(1, 5),
    points=st.integers(1, 3),
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3),
)
def test_equals_the_formula(
    seed: int,
    batch: int,
    queries: int,
    heads: int,
    channels: int,
    points: int,
    shapes: list[tuple[int, int]],
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pixels = sum(height * width for height, width in shapes)
    value = torch.randn(batch, pixels, heads, channels, generator=generator)
    grouped = (batch, queries, heads, len(shapes), points)
    # Beyond every border, and exactly on it.
    locations = (
        torch.randn(batch, queries, heads, len(shapes), points, 2, generator=generator) + 0.5
    )
    locations[torch.rand(locations.shape, generator=generator) < 0.1] = 1.0
    weights = torch.rand(grouped, generator=generator)
    result = ms_deform_attn(value, shapes, locations, weights)
    expected = by_hand(value, shapes, locations, weights)
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-5)


def test_half_precision_values_keep_exact_locations() -> None:
    # One row of 400 pixels: bfloat16 locations near 1.0 would be off by a pixel and more.
    value = torch.arange(400.0).view(1, 400, 1, 1).bfloat16()
    locations = torch.tensor([0.9 + 0.5 / 400, 0.5]).view(1, 1, 1, 1, 1, 2)
    result = ms_deform_attn(value, [(1, 400)], locations, torch.ones(1, 1, 1, 1, 1).bfloat16())
    assert result.dtype == torch.bfloat16
    assert result.item() == torch.tensor(360.0).bfloat16().item()


def test_wrong_arguments_are_named() -> None:
    value, locations = torch.zeros(1, 4, 1, 1), torch.zeros(1, 1, 1, 1, 1, 2)
    weights = torch.zeros(1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="do not add up to the 4 pixels"):
        ms_deform_attn(value, [(2, 3)], locations, weights)
    with pytest.raises(ValueError, match=r"takes value \[N, S, heads, channels\]"):
        ms_deform_attn(value[0], [(2, 2)], locations, weights)
