"""Recognising the deformable attentions of other projects that `replacement` replaces.

A module is known by the name of its class, the parameters of its ``forward``, its attributes and
the sizes of its linear layers. Two classes that agree in all of these may still compute different
things, so the class's own ``forward`` is also run on small tensors and has to give what the new one
gives.
"""

import functools
import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.ops import forwards
from vitadapter_zoo.ops.library import small_input, worst

# Largest difference of the two forwards on small tensors, relative to the largest value. It allows
# only for another order of sums.
TOLERANCE = 1e-5
_NUMBERS = ("d_model", "im2col_step", "n_heads", "n_levels", "n_points")
_LINEARS = ("attention_weights", "output_proj", "sampling_offsets", "value_proj")
_INNER = "MultiScaleDeformableAttention"

# transformers' modules that hold an `_INNER`, with the last parameter of their `forward`. The rule
# is that the operator saves about 5% of the model's time or more: these run it over all pixels of
# the maps (in an encoder) or for 900 queries (OmDet-Turbo). RT-DETR, RT-DETRv2, D-FINE, DEIMv2,
# LW-DETR, RF-DETR and PP-DocLayout run it for 300 queries of a decoder only, where it saves less
# than two runs differ by (docs/other-detectors.md), so they are not listed and stay as they are.
_HOLDERS = {
    "DeformableDetrMultiscaleDeformableAttention": "kwargs",
    "GroundingDinoMultiscaleDeformableAttention": "output_attentions",
    "MMGroundingDinoMultiscaleDeformableAttention": "output_attentions",
    "OmDetTurboMultiscaleDeformableAttention": "kwargs",
}
_HOLDER_PARAMETERS = (
    "self",
    "hidden_states",
    "attention_mask",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "position_embeddings",
    "reference_points",
    "spatial_shapes",
    "spatial_shapes_list",
    "level_start_index",
)


@dataclass(frozen=True)
class Probe:
    """Small tensors to run an attention on: two images, three levels, seven queries.

    Attributes:
        query: ``[2, 7, d_model]``.
        pixels: ``[2, S, d_model]``.
        references: ``[2, 7, levels, 2 or 4]`` or ``[1, 7, 1, 2]``.
        shapes: ``[levels, 2]``.
        padding: bool ``[2, S]``, True at some pixels.
    """

    query: Tensor
    pixels: Tensor
    references: Tensor
    shapes: Tensor
    padding: Tensor


@dataclass(frozen=True)
class Family:
    """A class with linear layers whose forward can be replaced.

    Attributes:
        forward: the new forward; the old one must have parameters of the same names.
        optional: attributes that a class may have besides `_NUMBERS`.
        run: runs a forward on a module and a probe and returns its output.
    """

    forward: Callable[..., Any]
    optional: tuple[str, ...]
    run: Callable[[Callable[..., Any], nn.Module, Probe], Tensor]


def _sizes(shapes: Tensor) -> list[tuple[int, int]]:
    return [(height, width) for height, width in shapes.tolist()]


def _starts(shapes: Tensor) -> Tensor:
    areas = shapes.prod(1)
    return areas.cumsum(0) - areas


def _run_mask2former(forward: Callable[..., Any], module: nn.Module, probe: Probe) -> Tensor:
    return forward(
        module,
        probe.query,
        attention_mask=probe.padding,
        encoder_hidden_states=probe.pixels,
        position_embeddings=probe.query.cos(),
        reference_points=probe.references,
        spatial_shapes_list=_sizes(probe.shapes),
    )[0]


def _run_oneformer(forward: Callable[..., Any], module: nn.Module, probe: Probe) -> Tensor:
    return forward(
        module,
        probe.query,
        attention_mask=probe.padding,
        encoder_hidden_states=probe.pixels,
        position_embeddings=probe.query.cos(),
        reference_points=probe.references,
        spatial_shapes=probe.shapes,
        spatial_shapes_list=_sizes(probe.shapes),
    )[0]


def _run_authors(forward: Callable[..., Any], module: nn.Module, probe: Probe) -> Tensor:
    return forward(
        module,
        probe.query,
        probe.references,
        probe.pixels,
        probe.shapes,
        _starts(probe.shapes),
        probe.padding,
    )


FAMILIES = {
    "Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention": Family(
        forwards.mask2former, (), _run_mask2former
    ),
    "OneFormerPixelDecoderEncoderMultiscaleDeformableAttention": Family(
        forwards.oneformer, (), _run_oneformer
    ),
    "MSDeformAttn": Family(forwards.authors, ("ratio",), _run_authors),
}


def found_in(module: nn.Module) -> nn.Module | None:
    """Return the module whose forward is to be replaced: ``module``, its child, or None."""
    name = type(module).__name__
    if name in _HOLDERS:
        return _inner_of(module)
    if name in FAMILIES and new_forward(type(module)) is not None:
        family = FAMILIES[name]
        if _is_plain(module) and _has_structure(module, _LINEARS, family.optional):
            kind: Any = type(module)
            layout = tuple(sorted(_public(module).items()))
            return module if _agrees(kind, layout, _widths(module)) else None
    return None


def new_forward(kind: type[nn.Module]) -> Callable[..., Any] | None:
    """Return the forward that replaces the one of the class ``kind``, or None.

    It is None for a class that is not known, and for a class that has the new forward already.
    """
    name = kind.__name__
    family = FAMILIES.get(name)
    forward = forwards.inner if name == _INNER else family.forward if family else None
    if forward is None or kind.forward is forward:
        return None
    return forward if _parameters(kind.forward) == _parameters(forward) else None


def _inner_of(holder: nn.Module) -> nn.Module | None:
    parameters = (*_HOLDER_PARAMETERS, _HOLDERS[type(holder).__name__])
    if not _has_structure(holder, (*_LINEARS, "attn"), ("disable_custom_kernels",)):
        return None
    inner = holder.get_submodule("attn")
    known = (
        _parameters(type(holder).forward) == parameters
        and type(inner).__name__ == _INNER
        and new_forward(type(inner)) is not None
        and _is_plain(inner)
        and not _public(inner)
        and not _own_tensors(inner)
        and not list(inner.children())
    )
    kind: Any = type(inner)
    return inner if known and _inner_agrees(kind) else None


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _is_plain(module: nn.Module) -> bool:
    """Return whether calls use the forward of the class and not one bound to the instance."""
    return "forward" not in vars(module)


def _public(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that are not PyTorch's own."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training"
    }


def _own_tensors(module: nn.Module) -> bool:
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return len(tensors) > 0


def _has_structure(module: nn.Module, children: tuple[str, ...], optional: tuple[str, ...]) -> bool:
    """Return whether attributes, submodules and the sizes of the linear layers are the known."""
    public = _public(module)
    if not set(_NUMBERS) <= set(public) <= {*_NUMBERS, *optional}:
        return False
    if not all(type(public[name]) is int and public[name] > 0 for name in _NUMBERS):
        return False
    if type(public.get("ratio", 1)) not in (int, float):
        return False
    if {name for name, _ in module.named_children()} != set(children):
        return False
    if _own_tensors(module):
        return False
    width, heads = public["d_model"], public["n_heads"]
    inside = int(width * public.get("ratio", 1))
    samples = heads * public["n_levels"] * public["n_points"]
    expected = {
        "sampling_offsets": (width, samples * 2),
        "attention_weights": (width, samples),
        "value_proj": (width, inside),
        "output_proj": (inside, width),
    }
    return inside % heads == 0 and _widths(module) == tuple(sorted(expected.items()))


def _widths(module: nn.Module) -> tuple[tuple[str, tuple[int, int]], ...]:
    """Return (inputs, outputs) of the linear layers by their names."""
    found = {}
    for name in _LINEARS:
        layer: Any = module.get_submodule(name)
        found[name] = (getattr(layer, "in_features", 0), getattr(layer, "out_features", 0))
    return tuple(sorted(found.items()))


def _in_new_thread(check: Callable[[], bool]) -> bool:
    """Run ``check`` without the caller's autograd, autocast and tracing, which are its thread's.

    The check runs code of another project, which may fail in any way: then it is not the code that
    we know.

    Raises:
        ZooError: our own operator cannot be used as ``VITADAPTER_ZOO_OP`` asks.
    """
    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(torch.no_grad()(check)).result()
        except ZooError:
            raise
        except Exception:
            return False


def _close(theirs: Tensor, ours: Tensor) -> bool:
    if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return False
    return worst([float((theirs - ours).abs().max() / theirs.abs().max())]) <= TOLERANCE


@functools.cache
def _inner_agrees(kind: Any) -> bool:
    """Return whether the class of an inner attention computes the operator."""

    def check() -> bool:
        value, shapes, locations, weights = small_input(8)
        given = (value, shapes, _sizes(shapes), _starts(shapes), locations, weights, 64)
        module = kind()
        return _close(kind.forward(module, *given), forwards.inner(module, *given))

    return _in_new_thread(check)


@functools.cache
def _agrees(
    kind: Any,
    attributes: tuple[tuple[str, Any], ...],
    widths: tuple[tuple[str, tuple[int, int]], ...],
) -> bool:
    """Return whether a module of this class and these sizes computes what the new forward does.

    The module of the check has layers of its own, so that no hook and no weight of the user's
    module takes part.
    """
    family = FAMILIES[kind.__name__]

    def check() -> bool:
        module = kind.__new__(kind)
        nn.Module.__init__(module)
        for name, value in attributes:
            setattr(module, name, value)
        for name, (inputs, outputs) in widths:
            setattr(module, name, _layer(inputs, outputs))
        values: dict[str, Any] = dict(attributes)
        return all(
            _close(
                family.run(kind.forward, module, probe), family.run(family.forward, module, probe)
            )
            for probe in _probes(values["d_model"], values["n_levels"])
        )

    return _in_new_thread(check)


def _layer(inputs: int, outputs: int) -> nn.Linear:
    """Create a layer whose weights do not depend on random numbers."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, dtype=torch.float32)
    layer.weight.copy_(_waves(outputs, inputs) / inputs**0.5)
    layer.bias.copy_(_waves(outputs))
    return layer


def _waves(*shape: int) -> Tensor:
    """Create numbers in -1..1 without a pattern that fits any size of a layer."""
    count = int(torch.Size(shape).numel())
    steps = torch.arange(count, dtype=torch.float32)
    return ((steps * 0.7548776662).frac() * 2 - 1).view(shape)


def _probes(width: int, levels: int) -> list[Probe]:
    """Create probes with points of each image and level, with boxes, and with shared points."""
    shapes = torch.tensor([[5 + level, 7 - level % 3] for level in range(levels)])
    pixels = int(shapes.prod(1).sum())
    query, values = _waves(2, 7, width), _waves(2, pixels, width).cos()
    padding = _waves(2, pixels) > 0.6
    every = [(_waves(2, 7, levels, last) + 1) / 2 for last in (2, 4)]
    return [
        Probe(query, values, references, shapes, padding)
        for references in (*every, every[0][:1, :, :1])
    ]
