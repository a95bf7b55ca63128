"""Multi-scale deformable attention (Deformable DETR, arXiv:2010.04159, section 4.1).

The operator ``vitadapter_zoo::ms_deform_attn`` and its rules for autograd, autocast, tracing and
vmap. What computes it on which device is `library.implementation`'s business.
"""

import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vitadapter_zoo.ops import reference
from vitadapter_zoo.ops.library import implementation

# Kept: what is registered through it goes when it goes. The private operators are the compiled
# kernels, for the devices whose library is loaded.
LIBRARY = torch.library.Library("vitadapter_zoo", "FRAGMENT")
_ARGUMENTS = (
    "Tensor value, Tensor spatial_shapes, Tensor sampling_locations, Tensor attention_weights"
)
LIBRARY.define(f"ms_deform_attn({_ARGUMENTS}) -> Tensor")
LIBRARY.define(f"_ms_deform_attn({_ARGUMENTS}) -> Tensor")
LIBRARY.define(
    f"_ms_deform_attn_backward(Tensor grad_output, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)"
)
# From the context and the output's gradient to those of the arguments, None for what has none.
Backward: TypeAlias = Callable[[Any, Tensor], tuple[Tensor | None, ...]]
_VALUE_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def ms_deform_attn(
    value: Tensor, spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Sample every level bilinearly at the given places and add up what was found.

    ``result[n, q, h] = sum over l, p of weights[n, q, h, l, p] *
    bilinear(value_l[n, :, h], locations[n, q, h, l, p])`` (equation 3 of the paper). A location
    (x, y) in 0..1 lies at pixel ``(x * width - 0.5, y * height - 0.5)``; pixels outside the map
    count as zero, and so does a location that is NaN or infinite.

    Computed by the compiled kernels where they are installed, otherwise by PyTorch's own operators
    (see ``vitadapter-zoo env``). Sums are made in float32 for values of half precision. Results do
    not depend on the number of threads. Second derivatives are not implemented.

    Args:
        value: ``[N, S, heads, channels]``, float32, float64, bfloat16 or (not on the CPU) float16:
            the levels' pixels in row-major order, one level after the other.
        spatial_shapes: ``[levels, 2]``, int64, on the device of ``value``: height and width of
            every level; their areas add up to ``S``.
        sampling_locations: ``[N, Q, heads, levels, points, 2]`` as (x, y), float64 with values of
            float64 and else float32: rounded to bfloat16 near 1.0 they would miss by up to a third
            of a pixel.
        attention_weights: ``[N, Q, heads, levels, points]`` in the dtype of ``value`` or of
            ``sampling_locations``.

    Returns:
        ``[N, Q, heads * channels]`` in the dtype of ``value``.

    Raises:
        ValueError: shapes that do not fit each other, or tensors on different devices.
        TypeError: a dtype other than these.
    """
    if not torch.is_autocast_enabled(value.device.type):  # its rule may change dtypes first
        _check_types(value, spatial_shapes, sampling_locations, attention_weights)
    check_shapes(value, spatial_shapes, sampling_locations, attention_weights)
    return torch.ops.vitadapter_zoo.ms_deform_attn(
        value, spatial_shapes, sampling_locations, attention_weights
    )


def check_shapes(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> None:
    """Refuse tensors whose shapes or devices do not fit each other."""
    devices = {str(tensor.device) for tensor in (value, shapes, locations, weights)}
    if len(devices) > 1:
        raise ValueError(
            f"ms_deform_attn takes tensors of one device, got {', '.join(sorted(devices))}"
        )
    fits = (value.dim(), shapes.dim(), locations.dim(), weights.dim()) == (4, 2, 6, 5)
    if fits:
        batch, _, heads, _ = value.shape
        _, queries, _, _, points, _ = locations.shape
        grouped = (batch, queries, heads, shapes.shape[0], points)
        fits = (
            tuple(locations.shape) == (*grouped, 2)
            and tuple(weights.shape) == grouped
            and shapes.shape[1] == 2
        )
    if not fits:
        raise ValueError(
            "ms_deform_attn takes value [N, S, heads, channels], spatial_shapes [levels, 2], "
            "sampling_locations [N, Q, heads, levels, points, 2] and attention_weights "
            f"[N, Q, heads, levels, points]; got {list(value.shape)}, {list(shapes.shape)}, "
            f"{list(locations.shape)} and {list(weights.shape)}"
        )
    # What a tensor says is known here only outside of tracing, and elsewhere costs waiting for it.
    if type(shapes) is Tensor and shapes.device.type == "cpu" and not torch.compiler.is_compiling():
        levels = [(height, width) for height, width in shapes.tolist()]
        if any(height < 1 or width < 1 for height, width in levels):
            raise ValueError(f"spatial_shapes has an empty level: {levels}")
        if sum(height * width for height, width in levels) != value.shape[1]:
            raise ValueError(
                f"the levels {levels} do not add up to the {value.shape[1]} pixels of value"
            )


def check_value(value: Tensor, shapes: Tensor) -> torch.dtype:
    """The dtype in which sums over ``value`` are made, and its sampling locations are given."""
    if value.dtype not in _VALUE_TYPES:
        raise TypeError(f"value must be a floating-point tensor, got {value.dtype}")
    if value.dtype == torch.float16 and value.device.type == "cpu":
        raise TypeError("float16 is not computed on the CPU; use bfloat16 or float32")
    if shapes.dtype != torch.int64:
        raise TypeError(f"spatial_shapes must be int64, got {shapes.dtype}")
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _check_types(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> None:
    wide = check_value(value, shapes)
    if locations.dtype != wide:
        raise TypeError(
            f"sampling_locations must be {wide} with a value of {value.dtype}, "
            f"got {locations.dtype}"
        )
    if weights.dtype not in (value.dtype, wide):
        raise TypeError(
            f"attention_weights must be {value.dtype}, like value, or {wide}; got {weights.dtype}"
        )


def _compute(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    if implementation(value.device).compiled:
        return torch.ops.vitadapter_zoo._ms_deform_attn(value, shapes, locations, weights)
    return reference.ms_deform_attn(value, shapes, locations, weights)


def _fake(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


def _fake_backward(
    grad_output: Tensor, value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        value.new_empty(value.shape),
        locations.new_empty(locations.shape),
        weights.new_empty(weights.shape),
    )


def alert_nondeterministic(device: torch.device) -> None:
    """Do what PyTorch's nondeterministic operators do under ``use_deterministic_algorithms``.

    On CUDA the gradient of ``value`` is a sum of atomic additions, whose order changes from call to
    call. On the CPU it is always the same.

    Raises:
        RuntimeError: deterministic algorithms are on, and not as warnings only.
    """
    if device.type != "cuda" or not torch.are_deterministic_algorithms_enabled():
        return
    message = (
        "the backward pass of vitadapter_zoo::ms_deform_attn on CUDA is not deterministic; compute "
        "it on the CPU, or use torch.use_deterministic_algorithms(True, warn_only=True)"
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)


def gradients(
    grad_output: Tensor, value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of value, locations and weights for that of the output."""
    if implementation(value.device).compiled:
        alert_nondeterministic(value.device)
        return torch.ops.vitadapter_zoo._ms_deform_attn_backward(
            grad_output, value, shapes, locations, weights
        )
    return reference.ms_deform_attn_backward(grad_output, value, shapes, locations, weights)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    grad_value, grad_locations, grad_weights = gradients(grad_output, *ctx.saved_tensors)
    return grad_value, None, grad_locations, grad_weights


def widened(
    value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Locations and weights in dtypes that the operator takes with ``value``."""
    wide = check_value(value, shapes)
    return locations.to(wide), weights if weights.dtype == value.dtype else weights.to(wide)


def _autocast(device_type: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Under autocast values stay as they come, and what is too narrow for them is widened."""

    def rule(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        locations, weights = widened(value, shapes, locations, weights)
        with torch.autocast(device_type, enabled=False):
            return torch.ops.vitadapter_zoo.ms_deform_attn(value, shapes, locations, weights)

    return rule


def register(
    name: str, compute: Callable[..., Tensor], fake: Callable[..., Tensor], backward: Backward
) -> None:
    """Give the declared operator ``name`` its rules; ``backward`` finds all its arguments saved."""

    def save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def once(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True, which would end in silently missing terms
            raise NotImplementedError(f"{name} has no second derivatives")
        return backward(ctx, grad_output)

    def refuse_vmap(info: Any, in_dims: Any, *arguments: Tensor) -> Any:
        raise NotImplementedError(
            f"{name} does not go through vmap; give it the batch as the first dimension"
        )

    qualified = f"vitadapter_zoo::{name}"
    LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake)
    torch.library.register_autograd(qualified, once, setup_context=save)
    torch.library.register_vmap(qualified, refuse_vmap)


register("ms_deform_attn", _compute, _fake, _backward)
LIBRARY.impl("ms_deform_attn", _autocast("cpu"), "AutocastCPU")
LIBRARY.impl("ms_deform_attn", _autocast("cuda"), "AutocastCUDA")
torch.library.register_fake("vitadapter_zoo::_ms_deform_attn_backward", _fake_backward)
