"""Tests of the 3x3 convolution in bfloat16, whose transforms and products are float32."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitadapter_zoo.ops import conv3x3 as op
from vitadapter_zoo.ops.conv3x3 import accepts, conv3x3, usable


def arguments(
    images: int, channels: int, outputs: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(images, channels, height, width, dtype=torch.bfloat16)
    weight = torch.randn(outputs, channels, 3, 3, dtype=torch.bfloat16)
    bias = torch.randn(outputs, dtype=torch.bfloat16)
    return x.contiguous(memory_format=torch.channels_last), weight, bias


@settings(max_examples=20, deadline=None)
@given(
    images=st.integers(1, 2),
    channels=st.integers(1, 8),
    outputs=st.integers(1, 8),
    height=st.integers(1, 19),
    width=st.integers(1, 19),
    relu=st.booleans(),
)
def test_only_the_result_is_rounded(
    images: int, channels: int, outputs: int, height: int, width: int, relu: bool
) -> None:
    assert usable()
    values = arguments(images, 16 * channels, 16 * outputs, height, width)
    x, weight, bias = (tensor.double() for tensor in values)
    right = F.conv2d(x, weight, bias, padding=1)
    if relu:
        right = right.relu()
    found = torch.ops.vitadapter_zoo.conv3x3(*values, relu)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous(memory_format=torch.channels_last)
    # Rounding to 8 bits, and what the sums in float32 lose.
    allowed = right.abs() * 2**-8 + 1e-5 * float(right.abs().max() + 1)
    assert ((found - right).abs() <= allowed).all()


def test_the_error_is_that_of_pytorch_s_convolution() -> None:
    values = arguments(1, 256, 256, 14, 14)
    x, weight, bias = (tensor.double() for tensor in values)
    right = F.conv2d(x, weight, bias, padding=1)
    mine = torch.ops.vitadapter_zoo.conv3x3(*values, False) - right
    theirs = F.conv2d(*values, padding=1) - right
    assert mine.square().mean() <= 1.001 * theirs.square().mean()


@pytest.mark.parametrize("amx", [False, True])
def test_with_amx_pytorch_computes_it(amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "AMX", amx)
    values = arguments(2, 32, 32, 15, 14)
    assert accepts(*values) != amx
    expected = torch.ops.vitadapter_zoo.conv3x3(*values, False)
    if amx:
        expected = F.conv2d(*values, padding=1)
    assert torch.equal(conv3x3(*values), expected)


def test_dtypes_are_not_mixed() -> None:
    x, weight, bias = arguments(1, 16, 16, 14, 14)
    assert not accepts(x, weight.float(), bias)
    assert not accepts(x, weight, bias.float())
