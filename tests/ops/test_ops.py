"""Tests of deformable attention, computed by the compiled kernels and by PyTorch's operators."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operators import Arguments, random_arguments, requiring_gradients, switched_to
from torch import Tensor
from torch.profiler import profile

from vitadapter_zoo.ops import ms_deform_attn, ms_deform_attn_fused
from vitadapter_zoo.ops.reference import locate

# Largest error of a result for each dtype of the values, relative to the largest result.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True, params=["compiled", "reference"])
def implementation(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    with switched_to(request.param, monkeypatch):
        yield request.param


def formula(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Compute equation 3 of Deformable DETR with plain loops in float64."""
    n, _, heads, channels = value.shape
    queries = locations.shape[1]
    result = np.zeros((n, queries, heads, channels))
    v, loc, w = value.double().numpy(), locations.double().numpy(), weights.double().numpy()
    for index in np.ndindex(weights.shape):
        image, query, head, level, _ = index
        height, width = shapes[level].tolist()
        start = int(shapes[:level].prod(1).sum())
        x, y = loc[index] * (width, height) - 0.5
        for row in (int(np.floor(y)), int(np.floor(y)) + 1):
            for column in (int(np.floor(x)), int(np.floor(x)) + 1):
                if 0 <= row < height and 0 <= column < width:
                    share = (1 - abs(y - row)) * (1 - abs(x - column))
                    pixel = v[image, start + row * width + column, head]
                    result[image, query, head] += w[index] * share * pixel
    return torch.from_numpy(result.reshape(n, queries, heads * channels))


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected value."""
    if expected.numel() == 0:
        return 0.0
    off = (result.double() - expected.double()).abs().max()
    return float(off / expected.double().abs().max().clamp(min=1e-3))


random_cases = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
sizes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3)


@random_cases
@given(
    seed=st.integers(0, 2**31),
    shapes=sizes,
    batch=st.integers(1, 3),
    queries=st.integers(0, 40),
    heads=st.integers(1, 3),
    channels=st.sampled_from([1, 3, 5, 16, 17, 32, 37, 64, 80]),
    points=st.integers(1, 3),
    dtype=st.sampled_from(list(TOLERANCES)),
)
def test_result_agrees_with_the_formula(
    seed: int,
    shapes: list[tuple[int, int]],
    batch: int,
    queries: int,
    heads: int,
    channels: int,
    points: int,
    dtype: torch.dtype,
) -> None:
    arguments = random_arguments(
        seed, shapes, batch=batch, queries=queries, heads=heads, channels=channels, points=points,
        dtype=dtype,
    )  # fmt: skip
    result = ms_deform_attn(*arguments)
    assert result.dtype == dtype
    assert result.shape == (batch, queries, heads * channels)
    assert relative_error(result, formula(*arguments)) < TOLERANCES[dtype]


@random_cases
@given(
    seed=st.integers(0, 2**31),
    shapes=sizes,
    batch=st.integers(1, 2),
    channels=st.sampled_from([3, 16, 32, 37, 64]),
)
def test_half_precision_gradients_agree_with_double_precision(
    seed: int, shapes: list[tuple[int, int]], batch: int, channels: int
) -> None:
    arguments = random_arguments(seed, shapes, batch=batch, channels=channels, dtype=torch.bfloat16)
    # A location on the border of two cells may be rounded to either, and the slope changes there.
    value, sizes, locations, weights = arguments
    locations.copy_((locations * 64).round() / 64 + 1e-3)
    grad = torch.randn(batch, 5, 2 * channels, generator=torch.Generator().manual_seed(seed))
    found = _gradients(arguments, grad.bfloat16())
    right = _gradients((value.double(), sizes, locations.double(), weights.double()), grad.double())
    for mine, expected in zip(found, right, strict=True):
        assert relative_error(mine, expected) < 0.03


def _gradients(arguments: Arguments, grad: Tensor) -> tuple[Tensor, ...]:
    value, shapes, locations, weights = requiring_gradients(arguments)
    output = ms_deform_attn(value, shapes, locations, weights)
    return torch.autograd.grad(output, (value, locations, weights), grad)


@pytest.mark.parametrize("channels", [1, 3, 8, 9, 32, 64])
def test_gradients_pass_gradcheck(channels: int) -> None:
    value, shapes, locations, weights = requiring_gradients(
        random_arguments(
            channels, [(3, 4), (2, 1), (1, 1)], batch=2, queries=2, channels=channels, points=2,
            dtype=torch.float64,
        )
    )  # fmt: skip
    # gradcheck takes steps of 1e-6. No step may cross from one cell into the next, where the slope
    # changes. Pixel + 0.5 = location * size; 0.0037 keeps it away from whole and half numbers.
    with torch.no_grad():
        locations.copy_((locations * 24).round() / 24 + 0.0037)
    assert torch.autograd.gradcheck(
        lambda v, loc, w: ms_deform_attn(v, shapes, loc, w),
        (value, locations, weights),
        fast_mode=channels > 9,
    )


def test_half_precision_values_do_not_round_locations() -> None:
    # In a row of 400 pixels, bfloat16 locations near 1.0 would be wrong by more than a pixel.
    value = torch.arange(400.0).view(1, 400, 1, 1).bfloat16()
    locations = torch.tensor([0.9 + 0.5 / 400, 0.5]).view(1, 1, 1, 1, 1, 2)
    shapes = torch.tensor([[1, 400]])
    result = ms_deform_attn(value, shapes, locations, torch.ones(1, 1, 1, 1, 1).bfloat16())
    assert result.dtype == torch.bfloat16
    assert result.item() == torch.tensor(360.0).bfloat16().item()


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf"), 1e30, -1e30])
@pytest.mark.parametrize("channels", [5, 32])
def test_a_location_that_is_nan_or_infinite_counts_as_zero(odd: float, channels: int) -> None:
    value, shapes, locations, weights = random_arguments(0, [(3, 5), (2, 2)], channels=channels)
    broken = locations.clone()
    broken[0, 2, :, :, 1, 1] = odd
    weights_without = weights.clone()
    weights_without[0, 2, :, :, 1] = 0
    torch.testing.assert_close(
        ms_deform_attn(value, shapes, broken, weights),
        ms_deform_attn(value, shapes, locations, weights_without),
    )
    gradients = _gradients((value, shapes, broken, weights), torch.ones(1, 5, 2 * channels))
    assert all(grad.isfinite().all() for grad in gradients)
    assert (gradients[1][0, 2, :, :, 1] == 0).all()


def test_an_infinite_pixel_affects_only_adjacent_samples() -> None:
    # For corners and points outside of the map the kernel reads some valid pixel. It must not
    # contribute, not even as 0 * infinity, which is NaN.
    value, shapes, locations, weights = random_arguments(0, [(4, 4)], queries=64, points=1)
    value[0, 0] = float("inf")
    pixel = locations * 4 - 0.5
    near_it = (pixel.abs() <= 1).all(-1).flatten(2).any(-1)
    result = ms_deform_attn(value, shapes, locations, weights).unflatten(-1, (2, 32))
    assert result[~near_it].isfinite().all()
    assert not result[near_it].isfinite().all()


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    arguments = random_arguments(0, [(20, 30), (10, 15)], batch=2, queries=700, heads=3)
    grad = torch.randn(2, 700, 96)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append((ms_deform_attn(*arguments), *_gradients(arguments, grad)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_forward_allocates_only_its_output(implementation: str) -> None:
    arguments = random_arguments(0, [(20, 30), (10, 15)], queries=700)
    with profile(profile_memory=True) as record:
        result = ms_deform_attn(*arguments)
    allocated = [
        event.self_cpu_memory_usage
        for event in record.events() or []
        if event.self_cpu_memory_usage > 0
    ]
    assert (sum(allocated) == result.numel() * 4) == (implementation == "compiled")


def test_noncontiguous_arguments_are_accepted() -> None:
    value, shapes, locations, weights = random_arguments(0, [(4, 6)])
    apart = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (value, weights)]
    assert not apart[0].is_contiguous()
    expected = ms_deform_attn(value, shapes, locations, weights)
    assert torch.equal(ms_deform_attn(apart[0], shapes, locations, apart[1]), expected)


def test_operator_passes_opcheck() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        arguments = requiring_gradients(random_arguments(0, [(4, 6), (2, 3)], dtype=dtype))
        torch.library.opcheck(torch.ops.vitadapter_zoo.ms_deform_attn.default, arguments)


def fused_arguments(
    seed: int, shapes: list[tuple[int, int]], dtype: torch.dtype, channels: int = 32
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Create value, shapes, reference points, offsets and logits of two images."""
    value, sizes, locations, weights = random_arguments(
        seed, shapes, batch=2, queries=11, channels=channels, dtype=dtype
    )
    points = locations[0, :, 0, 0, 0].clamp(0, 1)
    return value, sizes, points, (locations * 4 - 2).to(dtype), weights * 12 - 6


@random_cases
@given(
    seed=st.integers(0, 2**31),
    shapes=sizes,
    channels=st.sampled_from([3, 32, 64]),
    dtype=st.sampled_from(list(TOLERANCES)),
)
def test_fused_operator_agrees_with_softmax_scaling_and_the_plain_operator(
    seed: int, shapes: list[tuple[int, int]], channels: int, dtype: torch.dtype
) -> None:
    value, sizes, points, offsets, logits = fused_arguments(seed, shapes, dtype, channels)
    result = ms_deform_attn_fused(value, sizes, points, offsets, logits)
    assert result.dtype == dtype
    exact = locate(sizes, points.double(), offsets.double(), logits.double())
    expected = formula(value, sizes, *exact)
    assert relative_error(result, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("logit", [300.0, -300.0, float("-inf")])
def test_fused_softmax_handles_extreme_logits(logit: float) -> None:
    value, sizes, points, offsets, logits = fused_arguments(0, [(3, 4)], torch.float32)
    logits[:, :, :, :, 1] = logit
    locations, weights = locate(sizes, points, offsets, logits)
    torch.testing.assert_close(
        ms_deform_attn_fused(value, sizes, points, offsets, logits),
        ms_deform_attn(value, sizes, locations, weights),
    )


def test_fused_gradients_pass_gradcheck() -> None:
    value, shapes, points, offsets, logits = fused_arguments(3, [(3, 4), (2, 1)], torch.float64, 3)
    # As above, no step of gradcheck may cross from one cell into the next.
    points = (points * 24).round() / 24 + 0.0037
    sizes = shapes.flip(-1)[:, None]
    offsets = (offsets / sizes * 24).round() / 24 * sizes
    inputs = [tensor.requires_grad_() for tensor in (value, points, offsets, logits)]
    assert torch.autograd.gradcheck(
        lambda v, p, o, w: ms_deform_attn_fused(v, shapes, p, o, w), inputs, fast_mode=True
    )
    total = ms_deform_attn_fused(inputs[0], shapes, *inputs[1:]).sum()
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        torch.autograd.grad(total, inputs[0], create_graph=True)
    torch.library.opcheck(
        torch.ops.vitadapter_zoo.ms_deform_attn_fused.default, (inputs[0], shapes, *inputs[1:])
    )


def test_invalid_fused_arguments_are_reported() -> None:
    value, shapes, points, offsets, logits = fused_arguments(0, [(3, 4)], torch.float32)
    with pytest.raises(ValueError, match=r"reference_points must be \[11, 2\], got \[10, 2\]"):
        ms_deform_attn_fused(value, shapes, points[1:], offsets, logits)
    with pytest.raises(TypeError, match=r"must both be torch\.float32"):
        ms_deform_attn_fused(value, shapes, points, offsets, logits.double())
    with pytest.raises(TypeError, match=r"reference_points must be torch\.float32"):
        ms_deform_attn_fused(value.bfloat16(), shapes, points.bfloat16(), offsets, logits)
    with pytest.raises(NotImplementedError, match="does not support vmap"):
        torch.vmap(lambda v: ms_deform_attn_fused(v, shapes, points, offsets, logits))(value[None])


def test_compiles_and_exports_without_graph_breaks() -> None:
    arguments = random_arguments(0, [(4, 6), (2, 3)])

    def doubled(v: Tensor, s: Tensor, loc: Tensor, w: Tensor) -> Tensor:
        return ms_deform_attn(v * 2, s, loc, w)

    class Doubled(torch.nn.Module):
        def forward(self, v: Tensor, s: Tensor, loc: Tensor, w: Tensor) -> Tensor:
            return doubled(v, s, loc, w)

    expected = doubled(*arguments)
    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), expected)
    exported = torch.export.export(Doubled(), arguments).module()
    torch.testing.assert_close(exported(*arguments), expected)

    value, shapes, locations, weights = requiring_gradients(arguments)
    compiled(value, shapes, locations, weights).sum().backward()
    grad = _gradients((arguments[0] * 2, *arguments[1:]), torch.ones_like(expected))[0] * 2
    torch.testing.assert_close(value.grad, grad)


def test_autocast_does_not_narrow_locations() -> None:
    value, shapes, locations, weights = random_arguments(0, [(4, 6)], dtype=torch.bfloat16)
    expected = ms_deform_attn(value, shapes, locations, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ms_deform_attn(value, shapes, locations, weights), expected)
        mixed = ms_deform_attn(value, shapes, locations, weights.float())
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed, expected)


def test_vmap_and_second_derivatives_raise() -> None:
    value, shapes, locations, weights = requiring_gradients(random_arguments(0, [(4, 6)]))
    with pytest.raises(NotImplementedError, match="does not support vmap"):
        torch.vmap(lambda v: ms_deform_attn(v, shapes, locations, weights))(value[None])
    total = ms_deform_attn(value, shapes, locations, weights).sum()
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        torch.autograd.grad(total, value, create_graph=True)


Change = Callable[[Tensor, Tensor, Tensor, Tensor], Arguments]
WRONG: dict[str, tuple[type[Exception], Change]] = {
    r"\(4, 7\)\] do not add up to the 24 pixels": (
        ValueError, lambda v, s, loc, w: (v, torch.tensor([[4, 7]]), loc, w)),
    "has an empty level": (ValueError, lambda v, s, loc, w: (v, s * -1, loc, w)),
    r"takes value \[N, S, heads, channels\].*got \[24, 2, 32\]": (
        ValueError, lambda v, s, loc, w: (v[0], s, loc, w)),
    r"and \[1, 5, 2, 1, 3\]": (ValueError, lambda v, s, loc, w: (v, s, loc, w[..., :3])),
    "tensors on the same device, got cpu, meta": (
        ValueError, lambda v, s, loc, w: (v, s, loc.to("meta"), w)),
    "value must be a floating-point tensor, got torch.int64": (
        TypeError, lambda v, s, loc, w: (v.long(), s, loc, w)),
    "float16 is not computed on the CPU": (
        TypeError, lambda v, s, loc, w: (v.half(), s, loc, w)),
    "spatial_shapes must be int64": (TypeError, lambda v, s, loc, w: (v, s.int(), loc, w)),
    "sampling_locations must be torch.float32 with a value of torch.bfloat16": (
        TypeError, lambda v, s, loc, w: (v.bfloat16(), s, loc.bfloat16(), w)),
    "attention_weights must be torch.float32": (
        TypeError, lambda v, s, loc, w: (v, s, loc, w.double())),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_invalid_arguments_are_reported(message: str) -> None:
    error, change = WRONG[message]
    with pytest.raises(error, match=message):
        ms_deform_attn(*change(*random_arguments(0, [(4, 6)])))
