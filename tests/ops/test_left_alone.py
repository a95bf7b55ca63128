"""What `accelerate` leaves as it is: other classes, changed copies, and models that do not gain."""

import copy
import importlib.util
import inspect
import pickle
import sys
from types import ModuleType

import authors
import detectors
import pytest
import torch
import transformers
from attentions import Recorded
from authors import MSDeformAttn
from torch import Tensor, nn
from transformers.models.deformable_detr import modeling_deformable_detr
from transformers.models.mask2former import modeling_mask2former

from vitadapter_zoo.ops import accelerate, restore


@pytest.mark.parametrize("name", detectors.LEFT_ALONE)
def test_where_it_does_not_pay_nothing_is_replaced(name: str) -> None:
    model = detectors.left_alone(name)
    kinds = {id(module): type(module) for module in model.modules()}
    assert any("DeformableAttention" in kind.__name__ for kind in kinds.values())
    assert accelerate(model) == 0
    assert {id(module): type(module) for module in model.modules()} == kinds


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
