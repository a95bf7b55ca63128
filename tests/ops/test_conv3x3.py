"""Tests of the Winograd 3x3 convolution against PyTorch's."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import switched_to
from torch import Tensor, nn

from vitadapter_zoo.models.convolution import Conv3x3
from vitadapter_zoo.ops import conv3x3 as op
from vitadapter_zoo.ops.conv3x3 import accepts, conv3x3, tile_size, usable

PROJECT = Path(__file__).parents[2]
SIZE = (15, 14)  # of a map that the kernel computes; its last tiles are cut off


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def arguments(
    images: int, channels: int, outputs: int, height: int, width: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    x = channels_last(images, channels, height, width)
    return x, torch.randn(outputs, channels, 3, 3), torch.randn(outputs)


def error(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> float:
    """The largest error relative to the largest value, against a convolution in float64."""
    right = F.conv2d(
        x.double(), weight.double(), None if bias is None else bias.double(), padding=1
    )
    largest = right.abs().max()
    return float(((F.relu(right) if relu else right) - found).abs().max() / largest)


def compare(images: int, channels: int, outputs: int, height: int, width: int) -> None:
    x, weight, bias = arguments(images, channels, outputs, height, width)
    assert accepts(x, weight, bias) == (height * width >= 196)
    for shift, relu in ((bias, True), (None, False)):
        found = torch.ops.vitadapter_zoo.conv3x3(x, weight, shift, relu)
        assert error(found, x, weight, shift, relu) < 1e-5


def test_the_compiled_kernel_is_used_here() -> None:
    assert usable()


@settings(max_examples=60, deadline=None)
@given(
    images=st.integers(1, 3),
    channels=st.integers(1, 32),
    outputs=st.integers(1, 32),
    height=st.integers(1, 19),
    width=st.integers(1, 19),
)
def test_agrees_with_float64(
    images: int, channels: int, outputs: int, height: int, width: int
) -> None:
    compare(images, 16 * channels, 16 * outputs, height, width)


@pytest.mark.parametrize("name", ["portable", "avx2"])  # the other tests use the best
def test_lower_instruction_sets_agree_with_float64(name: str) -> None:
    code = (
        "from test_conv3x3 import compare\n"
        "from vitadapter_zoo.ops.library import implementation\n"
        "print(implementation('cpu').why)\n"
        "compare(2, 48, 80, 15, 14); compare(1, 16, 16, 2, 6); compare(1, 512, 48, 30, 9)"
    )
    folders = (PROJECT, Path(__file__).parent, PROJECT / "tests" / "support")
    variables = {"PYTHONPATH": ":".join(map(str, folders)), "VITADAPTER_ZOO_CPU": name}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"({name})" in done.stdout


def test_tiles_are_those_that_take_fewer_products() -> None:
    assert tile_size(200, 304) == tile_size(14, 14) == tile_size(3, 3) == 4
    assert tile_size(6, 6) == tile_size(2, 304) == tile_size(1, 1) == 2


def test_results_do_not_depend_on_threads_or_on_the_batch() -> None:
    x, weight, bias = arguments(7, 64, 48, 30, 41)
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 3, 8):
            torch.set_num_threads(number)
            results.append(conv3x3(x, weight, bias))
            results.append(torch.cat([conv3x3(image[None], weight, bias) for image in x]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_results_are_in_channels_last_order() -> None:
    x, weight, bias = arguments(2, 32, 16, *SIZE)
    assert conv3x3(x, weight, bias).is_contiguous(memory_format=torch.channels_last)
    ordered = weight.contiguous(memory_format=torch.channels_last)
    assert torch.equal(conv3x3(x, ordered, bias), conv3x3(x, weight, bias))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("relu", [False, True])
def test_nan_and_infinity_stay_in_their_tiles(value: float, relu: bool) -> None:
    x, weight, bias = arguments(2, 16, 32, 17, 17)
    for y, column in ((0, 0), (7, 8), (9, 11), (16, 16)):
        damaged = x.clone()
        damaged[1, 5, y, column] = value
        wrong = ~F.conv2d(damaged, weight, bias, padding=1).isfinite()
        # ReLU makes zeros of -inf; whether -inf or NaN reaches it differs.
        found = conv3x3(damaged, weight, bias, relu=relu)
        clean = conv3x3(x, weight, bias, relu=relu)
        tiles = F.max_pool2d(wrong.float(), 4, ceil_mode=True)
        tiles = tiles.repeat_interleave(4, 2).repeat_interleave(4, 3)[..., :17, :17] > 0
        assert torch.equal(found[~tiles], clean[~tiles])
        if not relu:
            assert not found[wrong].isfinite().any()
        elif value != value:
            assert found[wrong].isnan().all()


def test_rejects_what_would_read_out_of_bounds() -> None:
    x, weight, bias = arguments(1, 32, 16, *SIZE)
    maps = x.permute(0, 2, 3, 1)
    wrong = {
        "maps must be": (maps[..., :8], weight, bias, 4),
        "maps must be float32": (maps.double(), weight, bias, 4),
        "weight must be": (maps, weight[:8], bias[:8], 4),
        "weight must be .K, C, 3, 3.": (maps, weight[:, :, :2], bias, 4),
        "weight must be .K, C, 3, 3. of the maps' dtype": (maps, weight.double(), bias, 4),
        "weight must be .K, C": (maps[..., :16], weight, bias, 4),
        "bias must be": (maps, weight, bias[:8], 4),
        "bias must be .K. of the maps' dtype": (maps, weight, bias.bfloat16(), 4),
        "tile must be": (maps, weight, bias, 3),
    }
    for message, values in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            torch.ops.vitadapter_zoo._conv3x3_maps(*values, False)


def test_torch_s_checks_of_the_operator() -> None:
    x, weight, bias = arguments(2, 16, 32, 5, 7)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    operator = torch.ops.vitadapter_zoo.conv3x3
    for values in ((x, weight, bias, True), (*leaves, True), (leaves[0], weight, None, False)):
        torch.library.opcheck(operator, values)
    gradients = []
    for result in (operator(*leaves, True), F.relu(F.conv2d(*leaves, padding=1))):  # type: ignore[call-overload]
        gradients.append(torch.autograd.grad(result.square().sum(), leaves))
    for mine, right in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w: (x.double(), w.double()),
        lambda x, w: (x.contiguous(), w),
        lambda x, w: (channels_last(2, 24, *SIZE), torch.randn(32, 24, 3, 3)),
        lambda x, w: (x, w[:24]),
        lambda x, w: (x[:0], w),
        lambda x, w: (x, w.clone().requires_grad_()),
        lambda x, w: (x.requires_grad_(), w),
        lambda x, w: (x.half(), w.half()),
        lambda x, w: (x.to("meta"), w.to("meta")),
        lambda x, w: (channels_last(1, 528, *SIZE), torch.randn(16, 528, 3, 3)),
    ],
)
def test_everything_else_is_left_to_pytorch(
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> None:
    x, weight, _ = arguments(2, 32, 32, *SIZE)
    assert accepts(x, weight, None)
    x, weight = change(x, weight)
    assert not accepts(x, weight, None)
    found, right = conv3x3(x, weight), F.conv2d(x, weight, padding=1)
    assert found.requires_grad == right.requires_grad
    if not found.is_meta:
        assert torch.equal(found, right)


def test_settings_that_leave_it_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(2, 32, 32, *SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        assert not accepts(*given)
        assert conv3x3(*given).dtype == torch.bfloat16
    with switched_to("reference", monkeypatch):
        assert not accepts(*given)
        right = F.conv2d(*given, padding=1)
        assert torch.equal(conv3x3(*given), right)
        assert torch.equal(torch.ops.vitadapter_zoo.conv3x3(*given, False), right)
    batched = torch.vmap(lambda x: conv3x3(x[None], *given[1:])[0])(given[0])
    assert torch.equal(batched, F.conv2d(*given, padding=1))
    dual = torch.func.jvp(lambda x: conv3x3(x, *given[1:]), given[:1], (torch.ones_like(given[0]),))
    assert dual[1].abs().sum() > 0
    with torch.autograd.forward_ad.dual_level():
        dual_input = torch.autograd.forward_ad.make_dual(given[0], torch.ones_like(given[0]))
        tangent = torch.autograd.forward_ad.unpack_dual(conv3x3(dual_input, *given[1:])).tangent
        assert tangent is not None


def test_a_library_without_the_kernel_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_error", lambda: 0.5)
    op._works.cache_clear()
    try:
        with pytest.warns(UserWarning, match="wrong results here.*build-op"):
            assert not usable()
    finally:
        op._works.cache_clear()


@pytest.fixture
def layer() -> Conv3x3:
    torch.manual_seed(0)
    return Conv3x3(32, 48).eval().requires_grad_(False)


def agrees(layer: Conv3x3) -> bool:
    x = channels_last(2, 32, *SIZE)
    return error(layer(x), x, layer.weight, layer.bias, relu=False) < 1e-5


def changed(layer: Conv3x3) -> dict[str, Tensor]:
    return {name: value * 2 - 0.1 for name, value in layer.state_dict().items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.load_state_dict(changed(layer)),
        lambda layer: layer.load_state_dict(changed(layer), assign=True),
        lambda layer: layer.weight.mul_(3),
        lambda layer: layer.weight.data.add_(1),
        lambda layer: layer.weight.data.copy_(layer.weight.data.flip(0)),
        lambda layer: layer.to(torch.bfloat16).to(torch.float32),
        lambda layer: layer.to(memory_format=torch.channels_last),
        lambda layer: setattr(layer, "weight", nn.Parameter(-layer.weight, False)),
    ],
)
def test_changed_weights_are_used(layer: Conv3x3, change: Callable[[Conv3x3], object]) -> None:
    assert agrees(layer)
    change(layer)
    assert agrees(layer)


def test_training_uses_pytorch_s_convolution(layer: Conv3x3) -> None:
    x = channels_last(2, 32, *SIZE)
    right = F.relu(F.conv2d(x, layer.weight, layer.bias, padding=1))
    assert torch.equal(layer.train()(x, relu=True), right)
    layer.eval().requires_grad_(True)
    result = layer(x, relu=True)
    assert torch.equal(result, right)
    assert result.requires_grad
    small = channels_last(1, 32, 4, 4)
    assert torch.equal(layer(small), F.conv2d(small, layer.weight, layer.bias, padding=1))


@torch.no_grad()
def test_compile_and_export(layer: Conv3x3) -> None:
    torch._dynamo.reset()
    x = channels_last(2, 32, *SIZE)
    expected = layer(x, relu=True)
    operators: list[str] = []

    def noted(module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        operators.extend(str(node.target) for node in module.graph.nodes)
        return module

    compiled = torch.compile(layer, fullgraph=True, backend=noted)
    assert torch.equal(compiled(x, relu=True), expected)
    assert "vitadapter_zoo.conv3x3" in operators
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(x, relu=True), expected)
    exported = torch.export.export(layer, (x,), {"relu": True})
    assert "conv3x3" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(x, relu=True), expected, rtol=1e-4, atol=1e-5)
    traced = torch.jit.trace(layer, (x,))
    assert "vitadapter_zoo::" not in str(traced.inlined_graph)  # paths of files have "conv3x3"
