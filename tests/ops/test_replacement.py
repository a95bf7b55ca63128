"""`accelerate` and `restore` on the classes of transformers and on the authors' attention."""

import copy
import importlib.util
import inspect
import pickle
import sys
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import authors
import detectors
import pytest
import torch
import transformers
from authors import MSDeformAttn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.deformable_detr import modeling_deformable_detr
from transformers.models.mask2former import modeling_mask2former

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


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    if torch.equal(got, expected):  # infinities too
        return
    finite = expected.isfinite()
    assert torch.equal(finite, got.isfinite())
    worst = (got - expected)[finite].abs().max() / expected[finite].abs().max()
    assert worst <= tolerance, float(worst)


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


@pytest.mark.parametrize("name", detectors.LEFT_ALONE)
def test_where_it_does_not_pay_nothing_is_replaced(name: str) -> None:
    model = detectors.left_alone(name)
    kinds = {id(module): type(module) for module in model.modules()}
    assert any("DeformableAttention" in kind.__name__ for kind in kinds.values())
    assert accelerate(model) == 0
    assert {id(module): type(module) for module in model.modules()} == kinds


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


def changed(original: ModuleType, *changes: tuple[str, str]) -> ModuleType:
    """A copy of a module with its text changed."""
    text = inspect.getsource(original)
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    name = f"{original.__name__}_copy"
    spec = importlib.util.spec_from_loader(name, loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__package__ = original.__name__.rpartition(".")[0]
    module.__file__ = getattr(original, "__file__", None)
    sys.modules[name] = module
    try:
        exec(compile(text, name, "exec"), vars(module))  # noqa: S102
    finally:
        del sys.modules[name]
    return module


OUTER, INNER = "DeformableDetrMultiscaleDeformableAttention", "MultiScaleDeformableAttention"


@pytest.mark.parametrize(
    ("change", "count"),
    [
        (("import math", "import math"), 1),
        ((OUTER, "OtherAttention"), 0),
        ((INNER, "OtherInner"), 0),
        (("self.n_points", "self.points"), 0),
        (("self.im2col_step = 64", "self.im2col_step = 64; self.offset_scale = 0.5"), 0),
        (("        im2col_step: int,\n", "        im2col_step: int,\n        more=None,\n"), 0),
        (("encoder_attention_mask=None,", "encoder_mask=None,"), 0),
        (("align_corners=False", "align_corners=True"), 0),
        (('mode="bilinear"', 'mode="nearest"'), 0),
        (('padding_mode="zeros"', 'padding_mode="border"'), 0),
        (("batch_size, _, num_heads, hidden_dim = value.shape", "raise RuntimeError"), 0),
    ],
)
def test_a_changed_copy_of_deformable_detr_stays_as_it_is(
    change: tuple[str, str], count: int
) -> None:
    module = changed(modeling_deformable_detr, change)
    name = change[1] if change[0] == OUTER else OUTER
    config = transformers.DeformableDetrConfig(d_model=32, num_feature_levels=3)
    attention = getattr(module, name)(config, num_heads=4, n_points=4)
    assert accelerate(nn.Sequential(attention)) == count


@pytest.mark.parametrize(
    ("change", "count"),
    [
        (("import math", "import math"), 1),
        (("Mask2FormerPixelDecoderEncoderMultiscale", "PixelDecoderEncoderMultiscale"), 0),
        (("masked_fill(attention_mask[", "masked_fill(~attention_mask["), 0),
        (
            ("self.sampling_offsets(hidden_states)", "self.sampling_offsets(hidden_states).tanh()"),
            0,
        ),
        (("* reference_points[:, :, None, :, None, 2:] * 0.5", "* 0.5"), 0),
        (("self.n_heads", "self.heads"), 0),
        (
            (
                "reference_points=None,\n        spatial_shapes_list",
                "points=None, spatial_shapes_list",
            ),
            0,
        ),
    ],
)
def test_a_changed_copy_of_mask2former_stays_as_it_is(change: tuple[str, str], count: int) -> None:
    module = changed(modeling_mask2former, change)
    name = "Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention".replace(*change)
    assert accelerate(getattr(module, name)(32, num_heads=4, n_levels=3, n_points=4)) == count


@pytest.mark.parametrize(
    ("change", "count"),
    [
        (("import torch\n", "import torch\n"), 1),
        (("MSDeformAttn(", "MSDeformableAttention("), 0),
        (("self.ratio = ratio", "self.ratio = ratio; self.use_4D_normalizer = True"), 0),
        (("input_padding_mask: Tensor | None = None,", "mask: Tensor | None = None, more=0,"), 0),
        ((" * 0.5", ""), 0),
        (("value.masked_fill(", "value.masked_fill(~"), 0),
        (("self.output_proj(sampled", "query + self.output_proj(sampled"), 0),
        (
            (
                "total = value.new_zeros",
                "raise RuntimeError('not compiled')\n    total = value.new_zeros",
            ),
            0,
        ),
    ],
)
def test_a_changed_copy_of_the_authors_attention_stays_as_it_is(
    change: tuple[str, str], count: int
) -> None:
    module = changed(authors, change)
    name = "MSDeformableAttention" if change[1].startswith("MSDeformable") else "MSDeformAttn"
    assert accelerate(getattr(module, name)()) == count


def test_layers_of_other_sizes_parts_and_bound_forwards_stay() -> None:
    wide = MSDeformAttn()
    wide.value_proj = nn.Linear(64, 128)
    more = MSDeformAttn()
    more.register_buffer("scale", torch.ones(1))
    bound = MSDeformAttn()
    bound.forward = bound.forward  # type: ignore[method-assign]  # as hooks of other libraries do
    assert accelerate(nn.ModuleList([wide, more, bound])) == 0
    inner = Recorded("Deformable DETR").module
    inner.attn.forward = inner.attn.forward  # type: ignore[union-attr]
    assert accelerate(inner) == 0


def test_an_attention_in_two_places_counts_once() -> None:
    module = MSDeformAttn()
    holder = Recorded("Deformable DETR").module
    twin = copy.deepcopy(holder)
    twin.attn = holder.attn
    model = nn.ModuleList([module, nn.Sequential(module), holder, twin])
    assert accelerate(model) == 2
    assert restore(model) == 2
    assert type(module) is MSDeformAttn


def test_an_older_class_in_a_pickle_is_read_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pickle of a replaced module, read where the class has another signature."""
    module = MSDeformAttn()
    accelerate(module)
    stored = pickle.dumps(module)

    class Changed(MSDeformAttn):
        def forward(self, query: Tensor) -> Tensor:  # type: ignore[override]
            return query + 1

    Changed.__name__ = "MSDeformAttn"
    monkeypatch.setattr(authors, "MSDeformAttn", Changed)
    read = pickle.loads(stored)
    assert type(read) is Changed
    assert torch.equal(read(torch.ones(2)), torch.full((2,), 2.0))
