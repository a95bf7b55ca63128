"""Code written for the extension of 2020 runs on our operator."""

import sys
from typing import Any

import pytest
import torch
from operators import random_arguments, requiring_gradients
from torch import Tensor

from vitadapter_zoo.ops import compat, ms_deform_attn


@pytest.fixture(autouse=True)
def unregistered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, compat.NAME, raising=False)
    monkeypatch.setitem(sys.modules, compat.NAME, sys.modules[compat.__name__])
    monkeypatch.delitem(sys.modules, compat.NAME)


def starts(shapes: Tensor) -> Tensor:
    return torch.cat((shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]))


def test_a_function_in_the_extension_s_shape_gets_our_results() -> None:
    compat.register()
    import MultiScaleDeformableAttention as extension  # type: ignore[import-not-found] # noqa: N813

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Tensor:
            *tensors, ctx.step = arguments
            ctx.save_for_backward(*tensors)
            return extension.ms_deform_attn_forward(*tensors, ctx.step)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            value, locations, weights = extension.ms_deform_attn_backward(
                *ctx.saved_tensors, grads[0], ctx.step
            )
            return value, None, None, locations, weights, None

    value, shapes, locations, weights = requiring_gradients(
        random_arguments(0, [(6, 8), (3, 4)], batch=3, dtype=torch.float64)
    )
    theirs = Attention.apply(value, shapes, starts(shapes), locations, weights, 64)
    ours = ms_deform_attn(value, shapes, locations, weights)
    assert torch.equal(theirs, ours)
    inputs = (value, locations, weights)
    for mine, expected in zip(
        torch.autograd.grad(theirs.sum(), inputs),
        torch.autograd.grad(ours.sum(), inputs),
        strict=True,
    ):
        assert torch.equal(mine, expected)


def test_half_precision_comes_back_as_it_came() -> None:
    value, shapes, locations, weights = random_arguments(0, [(6, 8)], dtype=torch.bfloat16)
    narrow = locations.bfloat16()
    output = compat.ms_deform_attn_forward(value, shapes.int(), starts(shapes), narrow, weights, 1)
    assert torch.equal(output, ms_deform_attn(value, shapes, narrow.float(), weights))
    found = compat.ms_deform_attn_backward(
        value, shapes, starts(shapes), narrow, weights, output, 1
    )
    assert [grad.dtype for grad in found] == [torch.bfloat16] * 3


def test_levels_with_gaps_are_refused() -> None:
    value, shapes, locations, weights = random_arguments(0, [(6, 8), (3, 4)])
    with pytest.raises(ValueError, match=r"\[0, 40\], but the levels start at \[0, 48\]"):
        compat.ms_deform_attn_forward(value, shapes, torch.tensor([0, 40]), locations, weights, 64)


def test_registering_does_not_replace_an_imported_extension(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, compat.NAME, sys.modules["json"])
    with pytest.raises(RuntimeError, match="has been imported already"):
        compat.register()
