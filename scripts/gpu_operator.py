"""The section of ``gpu_check.py`` that checks the operators."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from gpu_common import Found, Setting, differentiable, in_parts
from torch import Tensor

from vitadapter_zoo.ops import ms_deform_attn, ms_deform_attn_fused, reference
from vitadapter_zoo.ops.library import check, implementation

# The largest errors that rounding can cause, relative to the largest value of the output.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
CHANNELS = (1, 3, 4, 8, 16, 20, 24, 32, 48, 64, 80, 128)
LEVELS = {
    1: [(13, 9)],
    2: [(9, 7), (3, 1)],
    3: [(12, 10), (6, 5), (3, 3)],
    4: [(8, 8), (4, 4), (2, 2), (1, 1)],
}


def operator(setting: Setting) -> Found:
    """Compare the operators with float64 on the CPU, and check their registration with PyTorch."""
    where = implementation(setting.device)
    if not where.compiled:
        raise RuntimeError(where.why)
    torch.manual_seed(0)
    return {"library": where.why} | in_parts(
        {
            "check_error": lambda: f"{check(torch.device(setting.device)):.1e}",
            "outputs": partial(_outputs, setting),
            "opcheck": partial(_opcheck, setting),
            "deterministic_mode": partial(_deterministic_mode, setting),
        }
    )


def _outputs(setting: Setting) -> Found:
    """Compare every output of every case; the error names all cases that are off."""
    worst: dict[str, float] = {}
    wrong = []
    cases = 0
    for name, error, limit in _operator_errors(setting):
        kind = name.split(",")[0]
        worst[kind] = max(worst.get(kind, 0.0), error)
        cases += 1
        if not error <= limit:
            wrong.append(f"{name}: relative error {error:.1e}, at most {limit:.0e}")
    if wrong:
        raise AssertionError(f"{len(wrong)} of {cases} outputs are off: {'; '.join(wrong[:8])}")
    return {
        "compared": cases,
        "worst_relative_error": {kind: f"{error:.1e}" for kind, error in worst.items()},
    }


def _operator_errors(setting: Setting) -> Iterator[tuple[str, float, float]]:
    """Yield the name, relative error and limit of every output of every case."""
    for dtype, limit in TOLERANCES.items():
        if dtype == torch.float16 and not setting.on_gpu:
            continue  # the CPU has no kernels for it
        for channels in CHANNELS[::5] if setting.quick else CHANNELS:
            for levels, points in ((1, 4), (2, 3), (3, 4), (4, 4)):
                plain, fused = _case(dtype, channels, levels, points)
                grad = torch.randn(2, 37, 3 * channels).to(dtype)
                for kind, mine, right, given in (
                    ("plain", ms_deform_attn, reference.ms_deform_attn, plain),
                    ("fused", ms_deform_attn_fused, _fused_reference, fused),
                ):
                    wide = [x if x.dtype == torch.int64 else x.double() for x in given]
                    got = _with_gradients(
                        mine, [x.to(setting.device) for x in given], grad.to(setting.device)
                    )
                    expected = _with_gradients(right, wide, grad.double())
                    name = f"{kind} {str(dtype)[6:]}, {channels} channels, {levels} x {points}"
                    for a, b in zip(got, expected, strict=True):
                        difference = (a.cpu().double() - b).nan_to_num(0).abs().max()
                        scale = b.nan_to_num(0).abs().max().clamp(min=1e-9)
                        yield name, float(difference / scale), limit


def _fused_reference(
    value: Tensor, shapes: Tensor, points: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    return reference.ms_deform_attn(
        value, shapes, *reference.locate(shapes, points, offsets, logits)
    )


def _case(
    dtype: torch.dtype, channels: int, levels: int, points: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Create arguments of the plain and the fused operator on the CPU.

    Gradients are discontinuous at a pixel's centre. Every location is at least a quarter of a pixel
    away from all centres, so rounding cannot move it to the other side.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = torch.tensor(LEVELS[levels])
    sizes = shapes.flip(-1)[:, None].to(wide)
    grouped = (2, 37, 3, levels, points)
    value = torch.randn(2, int(shapes.prod(1).sum()), 3, channels).to(dtype)
    pixels = torch.randint(-1, 14, (*grouped, 2)) + torch.randint(0, 2, (*grouped, 2)) / 2 + 0.25
    locations = pixels.to(wide) / sizes
    locations.view(-1)[3] = float("nan")
    logits = torch.randn(grouped).to(dtype)
    reference_points = (torch.randint(0, 8, (37, 2)) / 8).to(wide)
    offsets = (pixels.to(wide) - reference_points[:, None, None, None] * sizes).to(dtype)
    plain = (value, shapes, locations, logits.sigmoid())
    return plain, (value, shapes, reference_points, offsets, logits)


def _with_gradients(
    function: Callable[..., Tensor], arguments: list[Tensor], grad: Tensor
) -> list[Tensor]:
    """Return the output and the gradients of value and of the last two arguments."""
    leaves, wanted = differentiable(arguments)
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, wanted, grad)]


def _opcheck(setting: Setting) -> str:
    plain, _ = _case(torch.float32, 32, 3, 4)
    value, shapes, locations, weights = (tensor.to(setting.device) for tensor in plain)
    arguments = (value.requires_grad_(), shapes, locations.nan_to_num(0.3), weights)
    torch.library.opcheck(torch.ops.vitadapter_zoo.ms_deform_attn, arguments)
    return "passed"


def _deterministic_mode(setting: Setting) -> str:
    """The backward pass on a GPU adds in any order, so it must raise; the CPU's does not."""
    plain, _ = _case(torch.float32, 32, 3, 4)
    value, *rest = (tensor.to(setting.device) for tensor in plain)
    torch.use_deterministic_algorithms(True)
    try:
        ms_deform_attn(value.requires_grad_(), *rest).sum().backward()
    except RuntimeError as error:
        if "not deterministic" not in str(error):
            raise
        return "alerts"
    finally:
        torch.use_deterministic_algorithms(False)
    if not setting.on_gpu:
        return "computes, as it should on the CPU"
    raise AssertionError("the backward pass did not raise in deterministic mode")
