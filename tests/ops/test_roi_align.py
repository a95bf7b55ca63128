"""Tests of the compiled RoIAlign against torchvision's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

from vitadapter_zoo.ops.roi_align import roi_align, usable

PROJECT = Path(__file__).parents[2]


def random_rois(count: int, images: int, extent: float, seed: int = 0) -> Tensor:
    """Create boxes inside and outside of an image of ``extent`` pixels, some without area."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * extent * 1.2 - extent * 0.1
    sides = torch.rand(count, 2, generator=generator) ** 2 * extent
    sides[::7, 0] = 0
    sides[::11] *= 0.01
    image = torch.randint(images, (count, 1), generator=generator)
    return torch.cat([image, corners, corners + sides], dim=1)


def compare(channels: int, size: int) -> None:
    """Compare results and gradients with torchvision's."""
    torch.manual_seed(channels)
    x = torch.randn(2, channels, 13, 21)
    rois = random_rois(60, 2, 80)
    grad = torch.randn(60, channels, size, size)
    found = []
    for function in (
        lambda x: roi_align(x, rois, size, 0.25),
        lambda x: torchvision_roi_align(x, rois, size, 0.25, -1, aligned=True),
    ):
        leaf = x.clone().requires_grad_()
        pooled = function(leaf)
        found.append((pooled.detach(), *torch.autograd.grad(pooled, leaf, grad)))
    for mine, right in zip(*found, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)


def test_the_compiled_kernel_is_used_here() -> None:
    assert usable()


@pytest.mark.parametrize("channels", [1, 5, 16, 64, 80, 131])
@pytest.mark.parametrize("size", [1, 7, 14])
def test_agrees_with_torchvision(channels: int, size: int) -> None:
    compare(channels, size)


@pytest.mark.parametrize("name", ["portable", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_result(name: str) -> None:
    code = (
        "from test_roi_align import compare\n"
        "from vitadapter_zoo.ops.library import implementation\n"
        "print(implementation('cpu').why)\n"
        "for channels in (3, 80): compare(channels, 7)"
    )
    variables = {"PYTHONPATH": f"{PROJECT}:{Path(__file__).parent}", "VITADAPTER_ZOO_CPU": name}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"({name})" in done.stdout


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    x = torch.randn(2, 80, 40, 40).requires_grad_()
    rois = random_rois(100, 2, 160)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            pooled = roi_align(x, rois, 7, 0.25)
            results.append((pooled, *torch.autograd.grad(pooled.square().sum(), x)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_results_are_in_channels_last_order() -> None:
    x = torch.randn(1, 16, 9, 9)
    rois = random_rois(5, 1, 30)
    pooled = roi_align(x, rois, 7, 0.25)
    assert pooled.shape == (5, 16, 7, 7)
    assert pooled.is_contiguous(memory_format=torch.channels_last)
    ordered = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(roi_align(ordered, rois, 7, 0.25), pooled)
    assert roi_align(x, rois[:0], 7, 0.25).shape == (0, 16, 7, 7)


def test_a_box_of_nan_pools_zeros() -> None:
    rois = torch.tensor([[0, float("nan"), 1, 9, 9], [0, 1, 1, 9, float("nan")]])
    assert not roi_align(torch.ones(1, 4, 9, 9), rois, 3, 0.25).any()


def test_rejects_inputs_that_would_read_out_of_bounds() -> None:
    x, rois = torch.ones(2, 4, 9, 9), torch.tensor([[1.0, 1, 1, 9, 9]])
    infinite = torch.tensor([[0, 1, 1, float("inf"), 9]])
    wrong = {
        "a box has no image": (x, rois + 1, 3),
        "rois must be": (x, rois[:, :4], 3),
        "rois must be float32": (x, rois.double(), 3),
        "maps must be float32": (x.double(), rois, 3),
        "have no size": (x, rois, 0),
        "too large": (x, infinite, 3),
    }
    for message, (maps, boxes, size) in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            roi_align(maps, boxes, size, 1.0)
    with pytest.raises(RuntimeError, match="a box has no image"):
        roi_align(x, torch.tensor([[float("nan"), 1, 1, 9, 9]]), 3, 1.0)
    with pytest.raises(RuntimeError, match=r"gradient must be float32"):
        torch.ops.vitadapter_zoo._roi_align_backward(torch.ones(2, 3, 3, 4), rois, 2, 9, 9, 1.0)


def test_there_are_no_second_derivatives() -> None:
    x = torch.randn(1, 4, 9, 9).requires_grad_()
    pooled = roi_align(x, random_rois(3, 1, 9), 3, 1.0).square().sum()
    (grad,) = torch.autograd.grad(pooled, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
