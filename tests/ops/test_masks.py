"""Masks pasted and encoded at once: the same characters as resampling first and encoding then."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hotcoco import mask as coco_mask
from operators import switched_to
from torch import Tensor

from vitadapter_zoo.ops import paste_masks, paste_rle
from vitadapter_zoo.ops.masks import implementation

BOTH = pytest.mark.parametrize("wish", ["compiled", "reference"])


def expected(
    probabilities: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float
) -> list[str]:
    """The definition: whole masks, each encoded by hotcoco."""
    pasted = paste_masks(probabilities, boxes, size, threshold).numpy().astype(np.uint8)
    return [coco_mask.encode(np.asfortranarray(mask))["counts"].decode() for mask in pasted]


def random_masks(
    seed: int, count: int, size: tuple[int, int], cells: int = 28
) -> tuple[Tensor, Tensor]:
    """Smooth and rough maps; boxes from one pixel to beyond the image, also outside of it."""
    generator = torch.Generator().manual_seed(seed)
    rough = int(torch.randint(1, cells + 1, (1,), generator=generator))
    logits = torch.rand(count, 1, rough, rough, generator=generator) * 10 - 5
    smooth = torch.nn.functional.interpolate(logits, (cells, cells), mode="bilinear")[:, 0]
    extent = torch.tensor([size[1], size[0]])
    centres = (torch.rand(count, 2, generator=generator) * 1.4 - 0.2) * extent
    sides = 10 ** (torch.rand(count, 2, generator=generator) * 3 - 2.5) * extent
    boxes = torch.cat([centres - sides / 2, centres + sides / 2], dim=1)
    if seed % 3 == 0:
        boxes = boxes.round()
    if seed % 4 == 0:
        boxes = boxes.clamp(min=0).minimum(extent.repeat(2))  # as the networks give them
    return smooth.sigmoid(), boxes


@BOTH
@pytest.mark.parametrize("size", [(480, 640), (37, 53), (1, 9), (9, 1), (8, 8), (1300, 2100)])
def test_random_masks(wish: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    with switched_to(wish, monkeypatch):
        for seed in range(12 if size[0] < 1000 else 4):
            count = 40 if size[0] < 1000 else 3
            probabilities, boxes = random_masks(seed, count, size, 28 if seed % 2 else 7)
            threshold = (0.5, 0.3, 0.75)[seed % 3]
            found = paste_rle(probabilities, boxes, size, threshold)
            assert found == expected(probabilities, boxes, size, threshold)


def test_an_image_of_several_thousand_pixels() -> None:
    size = (4100, 5300)
    probabilities, boxes = random_masks(2, 3, size)
    boxes[0] = torch.tensor([-30.0, -20, 5400, 4200])
    assert paste_rle(probabilities, boxes, size) == expected(probabilities, boxes, size, 0.5)


@BOTH
def test_values_at_the_threshold_belong_to_the_object(
    wish: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit off in any pixel shows where the threshold is that pixel's own value."""
    probabilities, boxes = random_masks(1, 1, (60, 80))
    boxes[:] = torch.tensor([10.3, 4.7, 71.9, 55.1])
    x = ((torch.arange(9, 73) + 0.5 - boxes[0, 0]) / (boxes[0, 2] - boxes[0, 0])) * 2 - 1
    y = ((torch.arange(3, 57) + 0.5 - boxes[0, 1]) / (boxes[0, 3] - boxes[0, 1])) * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    values = torch.nn.functional.grid_sample(
        probabilities[None], grid[None], align_corners=False
    ).flatten()
    with switched_to(wish, monkeypatch):
        for value in values[::17]:
            for threshold in (value, torch.nextafter(value, torch.tensor(2.0))):
                found = paste_rle(probabilities, boxes, (60, 80), threshold.item())
                assert found == expected(probabilities, boxes, (60, 80), threshold.item())
        # 16 cells on 16 pixels, so that nothing is rounded.
        flat, box = torch.full((1, 16, 16), 0.5), torch.tensor([[2.0, 3, 18, 19]])
        counts = paste_rle(flat, box, (40, 50))[0].encode()
        assert coco_mask.area({"size": [40, 50], "counts": counts}) == 16 * 16


@BOTH
@pytest.mark.parametrize("cells", [(1, 1), (2, 5), (28, 28), (56, 3)])
def test_odd_boxes_and_maps(
    wish: str, cells: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes = torch.tensor(
        [
            [4.0, 4, 4, 9],  # no width
            [4.0, 4, 9, 4],
            [4.5, 4.5, 4.5, 4.5],
            [12.0, 12, 5, 3],  # ends before it begins
            [0.0, 0, 32, 24],  # the image
            [-3e38, -3e38, 3e38, 3e38],
            [-1e9, 3, 1e9, 7],
            [1e9, 1e9, 2e9, 2e9],  # outside, on every side
            [40.0, 3, 50, 9],
            [-20.0, 3, -10, 9],
            [3.0, -20, 9, -10],
            [3.0, 30, 9, 40],
            [31.5, 23.5, 31.6, 23.6],
            [-0.5, -0.5, 0.5, 0.5],
            [1e-30, 1e-30, 2e-30, 2e-30],
        ]
    )
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(len(boxes), *cells, generator=generator)
    probabilities[4] = 1
    with switched_to(wish, monkeypatch):
        for values in (probabilities, torch.ones_like(probabilities), probabilities * 0):
            for threshold in (0.5, 0.0, 1.0, 2.0):
                found = paste_rle(values, boxes, (24, 32), threshold)
                assert found == expected(values, boxes, (24, 32), threshold)
        values = probabilities.clone()
        values[:, 0] = float("nan")
        values[:, -1, -1] = float("inf")
        assert paste_rle(values, boxes, (24, 32)) == expected(values, boxes, (24, 32), 0.5)


@BOTH
def test_no_masks_and_other_strides(wish: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with switched_to(wish, monkeypatch):
        assert paste_rle(torch.zeros(0, 28, 28), torch.zeros(0, 4), (480, 640)) == []
        probabilities, boxes = random_masks(5, 6, (48, 64))
        turned = paste_rle(
            probabilities.mT, boxes.T.contiguous().T.requires_grad_(), (48, 64), threshold=0.4
        )
        assert turned == expected(probabilities.mT.contiguous(), boxes, (48, 64), 0.4)


def test_what_it_is_by_hand() -> None:
    """On 4 rows and 5 columns, 2 rows and 3 columns from (1, 1): runs of 5 2 2 2 2 2 5 pixels.

    From the fourth on, COCO writes the difference to the run two before.
    """
    counts = paste_rle(torch.ones(1, 1, 1), torch.tensor([[1.0, 1, 4, 3]]), (4, 5))
    assert counts == ["5220003"]


@BOTH
def test_wrong_input_is_refused(wish: str, monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities, boxes = torch.rand(2, 28, 28), torch.rand(2, 4)
    with switched_to(wish, monkeypatch):
        for wrong in (
            (probabilities[0], boxes),
            (probabilities, boxes[:1]),
            (probabilities, boxes[:, :3]),
            (probabilities[:, :0], boxes),
        ):
            with pytest.raises(ValueError, match=r"probabilities \[N, M, M\] and boxes \[N, 4\]"):
                paste_rle(*wrong, (48, 64))
        with pytest.raises(TypeError, match=r"must be float32, got torch\.float64"):
            paste_rle(probabilities.double(), boxes, (48, 64))
        for size in ((0, 64), (48, -1), (2**16, 2**16)):
            with pytest.raises(ValueError, match="size"):
                paste_rle(probabilities, boxes, size)
        for value in (float("nan"), float("inf")):
            boxes[1, 2] = value
            with pytest.raises(ValueError, match="NaN or infinite"):
                paste_rle(probabilities, boxes, (48, 64))


def test_the_kernel_stays_in_bounds_whatever_it_is_given() -> None:
    assert implementation().compiled, implementation().why
    kernel = torch.ops.vitadapter_zoo._paste_rle
    probabilities, boxes = torch.rand(2, 28, 28), torch.rand(2, 4)
    for wrong in (
        (probabilities[0], boxes, 4, 5),
        (probabilities, boxes[:1], 4, 5),
        (probabilities[:, :, :0], boxes, 4, 5),
        (probabilities.double(), boxes, 4, 5),
        (probabilities, boxes.long(), 4, 5),
        (probabilities, boxes, 0, 5),
        (probabilities, boxes, 2**40, 2**40),
    ):
        with pytest.raises(RuntimeError, match="paste_rle: "):
            kernel(*wrong, 0.5, True)
    nan, infinite = float("nan"), float("inf")
    odd = torch.tensor([[nan] * 4, [-infinite, 0, infinite, 5], [0, nan, 5, 5], [5, -infinite] * 2])
    for fused in (True, False):
        text, ends = kernel(torch.rand(4, 28, 28), odd, 40, 50, 0.5, fused)
        assert len(ends) == 4
        assert int(ends[-1]) == len(text)


def test_results_do_not_depend_on_threads() -> None:
    probabilities, boxes = random_masks(7, 30, (200, 300))
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(paste_rle(probabilities, boxes, (200, 300)))
    torch.set_num_threads(threads)
    assert results[0] == results[1] == results[2]


EACH = """
from test_masks import expected, random_masks
from vitadapter_zoo.ops import paste_rle
from vitadapter_zoo.ops.masks import implementation
print(implementation())
for seed in range(6):
    arguments = (*random_masks(seed, 30, (90, 120)), (90, 120), 0.5)
    assert paste_rle(*arguments) == expected(*arguments)
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
@pytest.mark.parametrize("kernel", ["portable", "avx2"])
def test_whatever_instructions_torch_and_the_kernel_use(capability: str, kernel: str) -> None:
    """Rounds as this torch does: its builds for AVX2 and newer fuse products and sums."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), *sys.path])
    environment = os.environ | {
        "PYTHONPATH": path,
        "ATEN_CPU_CAPABILITY": capability,
        "VITADAPTER_ZOO_CPU": kernel,
        "VITADAPTER_ZOO_OP": "compiled",
    }
    done = subprocess.run(
        [sys.executable, "-c", EACH], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "compiled=True" in done.stdout
