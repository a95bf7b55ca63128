"""Code written for the extension of 2020 runs on our operator."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from operators import random_arguments, requiring_gradients
from torch import Tensor

from vitadapter_zoo.ops import compat, ms_deform_attn


@pytest.fixture(autouse=True)
def unregistered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in compat.NAMES:
        monkeypatch.setitem(sys.modules, name, sys.modules[compat.__name__])
        monkeypatch.delitem(sys.modules, name)


def starts(shapes: Tensor) -> Tensor:
    return torch.cat((shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]))


def attention(extension: Any) -> Any:
    """An autograd function around the extension, as those projects write it."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Tensor:
            *tensors, ctx.step = arguments
            ctx.save_for_backward(*tensors)
            return extension.ms_deform_attn_forward(*tensors, ctx.step)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *grads: Tensor) -> Any:
            value, locations, weights = extension.ms_deform_attn_backward(
                *ctx.saved_tensors, grads[0], ctx.step
            )
            return value, None, None, locations, weights, None

    return Attention


# How each project imports the extension. Only the import and the two calls were taken from them;
# the projects themselves were not run.
IMPORTS = {
    "Deformable DETR": "import MultiScaleDeformableAttention as MSDA",
    "Mask2Former": "try:\n    import MultiScaleDeformableAttention as MSDA\n"
    "except ModuleNotFoundError as e:\n    raise ModuleNotFoundError('Please compile') from e",
    "DINOv3": "try:\n    import MultiScaleDeformableAttention as MSDA\n"
    "except ImportError:\n    MSDA = None",
    "GroundingDINO": "from groundingdino import _C as MSDA",
}


@pytest.fixture
def groundingdino(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name without its compiled part."""
    (tmp_path / "groundingdino").mkdir()
    (tmp_path / "groundingdino" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "groundingdino", sys)
    monkeypatch.delitem(sys.modules, "groundingdino")


@pytest.mark.usefixtures("groundingdino")
@pytest.mark.parametrize("project", IMPORTS)
def test_a_function_in_the_extension_s_shape_gets_our_results(project: str) -> None:
    compat.register()
    compat.register()  # again: nothing changes
    found: dict[str, Any] = {}
    exec(IMPORTS[project], found)  # noqa: S102
    value, shapes, locations, weights = requiring_gradients(
        random_arguments(0, [(6, 8), (3, 4)], batch=3, dtype=torch.float64)
    )
    function = attention(found["MSDA"])
    theirs = function.apply(value, shapes, starts(shapes), locations, weights, 64)
    ours = ms_deform_attn(value, shapes, locations, weights)
    assert torch.equal(theirs, ours)
    inputs = (value, locations, weights)
    for mine, expected in zip(
        torch.autograd.grad(theirs.sum(), inputs),
        torch.autograd.grad(ours.sum(), inputs),
        strict=True,
    ):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_compiles_into_one_graph(dtype: torch.dtype) -> None:
    function = attention(compat)

    def run(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return function.apply(value * 2, shapes, starts(shapes), locations, weights, 64).float()

    arguments = requiring_gradients(random_arguments(0, [(6, 8), (3, 4)], batch=3, dtype=dtype))
    inputs = [tensor for tensor in arguments if tensor.requires_grad]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, got = run(*arguments), compiled(*arguments)
    assert torch.equal(got, expected)
    for mine, right in zip(
        torch.autograd.grad(got.sum(), inputs),
        torch.autograd.grad(expected.sum(), inputs),
        strict=True,
    ):
        assert torch.equal(mine, right)


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


@pytest.mark.parametrize("name", compat.NAMES)
def test_registering_does_not_replace_an_imported_extension(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, sys.modules["json"])
    with pytest.raises(RuntimeError, match=f"{name} has been imported already"):
        compat.register()
    others = [other for other in compat.NAMES if other != name]
    assert not any(other in sys.modules for other in others)
