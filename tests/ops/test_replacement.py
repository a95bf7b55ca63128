"""`accelerate` and `restore` on the classes of transformers and on the authors' attention."""

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import authors
import detectors
import pytest
import torch
from attentions import Recorded, assert_close, authors_arguments, built, randomised, tensors
from authors import MSDeformAttn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vitadapter_zoo.ops import accelerate, families, restore

Call = Callable[[Any], Any]


class Operators(TorchDispatchMode):
    """Counts the operators that compute deformable attention."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("ms_deform_attn", "ms_deform_attn_fused", "grid_sampler_2d"):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def outputs(name: str, model: nn.Module) -> list[Tensor]:
    """What encoder and decoder return for the family's input."""
    kept: list[Any] = []
    handles = [
        module.register_forward_hook(lambda _module, _given, output: kept.append(output))
        for module in detectors.FAMILIES[name].around(model)
    ]
    model(**detectors.FAMILIES[name].inputs())
    for handle in handles:
        handle.remove()
    return tensors(kept)


def gradients(model: nn.Module, parts: list[Tensor]) -> dict[str, Tensor]:
    """Gradients of all parameters for the parts' product with fixed random numbers."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(2)
    products = [
        (part * torch.randn(part.shape, generator=generator, dtype=part.dtype)).sum()
        for part in parts
        if part.requires_grad and part.isfinite().all()  # not what is masked with infinities
    ]
    # OmDet-Turbo keeps the embeddings of its last words, and with them their graph.
    torch.stack(products).sum().backward(retain_graph=True)
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("name", detectors.FAMILIES)
def test_a_family_computes_what_it_computed(name: str) -> None:
    model = built(name)
    expected = outputs(name, model)
    right = gradients(model, expected)
    keys, shown = list(model.state_dict()), repr(model)
    count = detectors.FAMILIES[name].attentions
    random_state = torch.get_rng_state()

    assert accelerate(model) == count
    assert accelerate(model) == 0
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (list(model.state_dict()), repr(model)) == (keys, shown)
    with Operators() as operators:
        got = outputs(name, model)
    assert operators.counts["ms_deform_attn"] == count
    for mine, theirs in zip(got, expected, strict=True):
        assert_close(mine, theirs)
    found = gradients(model, got)
    assert found.keys() == right.keys()
    attentions = [key for key in found if "sampling_offsets" in key or "value_proj" in key]
    assert len(attentions) == 4 * count  # weights and biases
    largest = max(float(grad.abs().max()) for grad in right.values())
    for key, grad in right.items():
        # Elsewhere a gradient may cancel to nothing, as that of a bias before a normalisation.
        scale = float(grad.abs().max()) if key in attentions else largest
        assert float((found[key] - grad).abs().max()) <= 1e-5 * scale, key

    assert restore(model) == count
    assert restore(model) == 0
    for again, theirs in zip(outputs(name, model), expected, strict=True):
        assert torch.equal(again, theirs)


def case(name: str) -> tuple[nn.Module, Call]:
    """An attention and a call of it; one of each form that is replaced."""
    if name == "MSDeformAttn":
        return randomised(MSDeformAttn()), lambda module: module(*authors_arguments(2))
    recorded = Recorded(name)
    return recorded.module, recorded


FORMS = ["Deformable DETR", "Mask2Former", "MSDeformAttn"]


@pytest.mark.parametrize("name", FORMS)
def test_classes_weights_hooks_and_modes_stay(name: str) -> None:
    module, call = case(name)
    kinds = [type(part) for part in module.modules()]
    storage = [tensor.data_ptr() for tensor in module.parameters()]
    seen: list[str] = []
    for part in module.modules():
        part.register_forward_hook(lambda part, _given, _out: seen.append(type(part).__name__))
    module.train()
    with torch.no_grad():
        expected = call(module)
        before, seen[:] = seen[:], []
        assert accelerate(module) == 1
        got = call(module)
    assert_close(got, expected)
    assert seen == before
    assert all(isinstance(part, kind) for part, kind in zip(module.modules(), kinds, strict=True))
    assert all(part.training for part in module.modules())
    assert [tensor.data_ptr() for tensor in module.parameters()] == storage
    restore(module)
    assert [type(part) for part in module.modules()] == kinds


@pytest.mark.parametrize("name", FORMS)
def test_copies_and_pickles(name: str) -> None:
    module, call = case(name)
    plain = pickle.dumps(module)
    with torch.no_grad():
        expected = call(module)
        assert accelerate(copy.deepcopy(module)) == 1
        assert accelerate(module) == 1
        ours = call(module)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(call(other), ours)
            assert accelerate(other) == 0
            assert restore(other) == 1
            assert torch.equal(call(other), expected)
        assert restore(module) == 1  # the copies had classes of their own
    assert pickle.dumps(module) == plain
    assert b"vitadapter_zoo" not in plain


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    module, call = case(name)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        expected = call(module)
        accelerate(module)
        assert_close(call(module), expected, 2e-2)


@pytest.mark.parametrize("name", FORMS)
def test_compiled_into_one_graph_before_and_after(name: str) -> None:
    module, call = case(name)
    torch.compiler.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=name != "MSDeformAttn")
    with torch.no_grad():
        expected = call(module)
        assert_close(call(compiled), expected)
        accelerate(module)
        assert torch.equal(call(compiled), call(module))
        alone = torch.compile(module, backend="aot_eager", fullgraph=True)
        assert torch.equal(call(alone), call(module))
        restore(module)
        assert_close(call(compiled), expected)


def test_dropout_draws_the_same_numbers() -> None:
    model = built("Deformable DETR").train()
    found = []
    for step in (lambda _model: 0, accelerate):
        step(model)
        torch.manual_seed(7)
        found.append(outputs("Deformable DETR", model)[0])
    assert_close(found[1], found[0])
    torch.manual_seed(8)
    assert not torch.allclose(outputs("Deformable DETR", model)[0], found[0], rtol=1e-2)


@pytest.mark.parametrize("ratio", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["points", "boxes", "shared points"])
def test_the_authors_attention(ratio: float, kind: str) -> None:
    module = randomised(MSDeformAttn(ratio=ratio))
    arguments = authors_arguments(4 if kind == "boxes" else 2, shared=kind == "shared points")

    def run() -> list[Tensor]:
        leaves = [arguments[index].clone().requires_grad_() for index in (0, 1, 2)]
        output = module(*leaves, *arguments[3:])
        inputs = [*leaves, *module.parameters()]
        return [output, *torch.autograd.grad((output * output.cos()).sum(), inputs)]

    expected = run()
    assert accelerate(nn.ModuleList([module])) == 1
    with Operators() as operators:
        got = run()
    fused = kind == "shared points"
    assert operators.counts["ms_deform_attn_fused" if fused else "ms_deform_attn"] == 1
    assert operators.counts["grid_sampler_2d"] == 0
    for mine, theirs in zip(got, expected, strict=True):
        assert_close(mine, theirs)


def test_the_attention_of_dinov2_trains_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs computes in an autograd function without a backward pass."""

    class ForwardOnly(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Tensor) -> Tensor:
            return by_grid_sample(*arguments)

    by_grid_sample = authors.by_grid_sample
    monkeypatch.setattr(authors, "by_grid_sample", ForwardOnly.apply)
    families._agrees.cache_clear()
    module = MSDeformAttn()
    arguments = authors_arguments(2)
    with pytest.raises(NotImplementedError, match="backward"):
        module(*arguments).sum().backward()
    assert accelerate(module) == 1
    module(*arguments).sum().backward()
    gradient = module.value_proj.weight.grad
    assert gradient is not None
    assert float(gradient.abs().sum()) > 0


def test_levels_that_do_not_fit_are_refused() -> None:
    module = MSDeformAttn()
    accelerate(module)
    arguments = list(authors_arguments(2))
    arguments[3] = arguments[3] + 1
    with pytest.raises(ValueError, match="do not add up to"):
        module(*arguments)
    recorded = Recorded("Mask2Former")
    accelerate(recorded.module)
    given, named = recorded.calls[0]
    named = {**named, "spatial_shapes_list": [(2, 2)] * 3}
    with pytest.raises(ValueError, match="the levels have 12 pixels"):
        recorded.module(*given, **named)
