"""Multi-scale deformable attention (Deformable DETR, arXiv:2010.04159, section 4.1).

This module defines the operator ``vitadapter_zoo::ms_deform_attn`` and its rules for autograd,
autocast, tracing and vmap. `library.implementation` chooses what computes it on a device.
"""

import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vitadapter_zoo.ops import reference
from vitadapter_zoo.ops.library import implementation

# This object must stay alive: torch removes its registrations when it is deleted. The operators
# with an underscore are the compiled kernels; they exist for devices whose library is loaded.
LIBRARY = torch.library.Library("vitadapter_zoo", "FRAGMENT")
_ARGUMENTS = (
    "Tensor value, Tensor spatial_shapes, Tensor sampling_locations, Tensor attention_weights"
)
LIBRARY.define(f"ms_deform_attn({_ARGUMENTS}) -> Tensor")
LIBRARY.define(f"_ms_deform_attn({_ARGUMENTS}) -> Tensor")
LIBRARY.define(
    f"_ms_deform_attn_backward(Tensor grad_output, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)"
)
# Takes autograd's context and the output's gradient; returns the arguments' gradients, or None.
Backward: TypeAlias = Callable[[Any, Tensor], tuple[Tensor | None, ...]]
_VALUE_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def ms_deform_attn(
    value: Tensor, spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Sample every level bilinearly at the given locations and return the weighted sums.

    ``result[n, q, h] = sum over l, p of weights[n, q, h, l, p] *
    bilinear(value_l[n, :, h], locations[n, q, h, l, p])`` (equation 3 of the paper). A location
    (x, y) in 0..1 lies at pixel ``(x * width - 0.5, y * height - 0.5)``; pixels outside the map
    count as zero, and so does a location that is NaN or infinite.

    The compiled kernels compute this where they are installed. Otherwise PyTorch's own operators
    do; ``vitadapter-zoo env`` shows which. Values of half precision are summed in float32. Results
    do not depend on the number of threads. Second derivatives are not implemented.

    Args:
        value: ``[N, S, heads, channels]``, float32, float64, bfloat16 or (not on the CPU) float16:
            the levels' pixels in row-major order, one level after the other.
        spatial_shapes: ``[levels, 2]``, int64, on the device of ``value``: height and width of
            every level; their areas add up to ``S``.
        sampling_locations: ``[N, Q, heads, levels, points, 2]`` as (x, y), float64 if ``value`` is
            float64, otherwise float32. In bfloat16, locations near 1.0 would be wrong by up to a
            third of a pixel.
        attention_weights: ``[N, Q, heads, levels, points]`` in the dtype of ``value`` or of
            ``sampling_locations``.

    Returns:
        ``[N, Q, heads * channels]`` in the dtype of ``value``.

    Raises:
        ValueError: shapes that do not fit each other, or tensors on different devices.
        TypeError: a tensor has another dtype.
    """
    if not torch.is_autocast_enabled(value.device.type):  # autocast may still change the dtypes
        _check_types(value, spatial_shapes, sampling_locations, attention_weights)
    check_shapes(value, spatial_shapes, sampling_locations, attention_weights)
    return torch.ops.vitadapter_zoo.ms_deform_attn(
        value, spatial_shapes, sampling_locations, attention_weights
    )


def check_shapes(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> None:
    """Raise a ValueError if shapes or devices of the tensors do not fit each other."""
    devices = {str(tensor.device) for tensor in (value, shapes, locations, weights)}
    if len(devices) > 1:
        raise ValueError(
            f"ms_deform_attn takes tensors on the same device, got {', '.join(sorted(devices))}"
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
    # The values are unknown while tracing, and reading them from a GPU would wait for the GPU.
    if type(shapes) is Tensor and shapes.device.type == "cpu" and not torch.compiler.is_compiling():
        levels = [(height, width) for height, width in shapes.tolist()]
        if any(height < 1 or width < 1 for height, width in levels):
            raise ValueError(f"spatial_shapes has an empty level: {levels}")
        if sum(height * width for height, width in levels) != value.shape[1]:
            raise ValueError(
                f"the levels {levels} do not add up to the {value.shape[1]} pixels of value"
            )


def check_value(value: Tensor, shapes: Tensor) -> torch.dtype:
    """Check the dtypes; return that of sums over ``value`` and of its sampling locations."""
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
    """Raise or warn under ``use_deterministic_algorithms``, as PyTorch's own operators do.

    On CUDA the gradient of ``value`` is summed by atomic additions, whose order changes between
    calls. On the CPU the order is fixed.

    Raises:
        RuntimeError: deterministic algorithms are on, without ``warn_only``.
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
    """Compute the gradients of value, locations and weights from the output's gradient."""
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
    """Convert locations and weights to dtypes that the operator accepts with ``value``."""
    wide = check_value(value, shapes)
    return locations.to(wide), weights if weights.dtype == value.dtype else weights.to(wide)


def _autocast(device_type: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return the autocast rule: ``value`` stays as it is; other dtypes are widened to fit it."""

    def rule(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        locations, weights = widened(value, shapes, locations, weights)
        with torch.autocast(device_type, enabled=False):
            return torch.ops.vitadapter_zoo.ms_deform_attn(value, shapes, locations, weights)

    return rule


def register(
    name: str, compute: Callable[..., Tensor], fake: Callable[..., Tensor], backward: Backward
) -> None:
    """Register the rules of the operator ``name``; ``backward`` gets all saved arguments."""

    def save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def once(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: the graph would lack terms silently
            raise NotImplementedError(f"{name} has no second derivatives")
        return backward(ctx, grad_output)

    def refuse_vmap(info: Any, in_dims: Any, *arguments: Tensor) -> Any:
        raise NotImplementedError(
            f"{name} does not support vmap; pass the batch as the first dimension"
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
