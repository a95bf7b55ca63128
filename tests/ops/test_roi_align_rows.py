"""Tests of RoIAlign into rows of a tensor, in float32 and bfloat16."""

import pytest
import torch
from torch import Tensor

from vitadapter_zoo.models import boxes
from vitadapter_zoo.models.boxes import pool_rois
from vitadapter_zoo.ops.roi_align import roi_align, roi_align_into

ROIS = torch.tensor([[0, 2, 3, 30, 21], [1, -3, -9, 50, 11], [0, 5, 5, 5, 9], [1, 1, 1, 9, 9.5]])
ROWS = torch.tensor([3, 0, 5, 1])


def maps(channels: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(channels)
    return torch.randn(2, channels, 13, 21).to(dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [5, 16, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_chosen_rows_are_written(channels: int, dtype: torch.dtype) -> None:
    x = maps(channels, dtype)
    output = torch.full((6, 7, 7, channels), 9, dtype=dtype)
    roi_align_into(output, ROWS, x, ROIS, 0.25)
    # Sums are float32 in both; the result is rounded once.
    right = roi_align(x.float(), ROIS, 7, 0.25).to(dtype)
    assert torch.equal(output[ROWS].permute(0, 3, 1, 2), right)
    assert (output[[2, 4]] == 9).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_of_all_levels_is_the_same_with_gradients(dtype: torch.dtype) -> None:
    levels = [torch.randn(2, 16, 128 // s, 160 // s).to(dtype) for s in (4, 8, 16, 32)]
    corners = torch.rand(40, 2) * 100
    rois = torch.cat([torch.arange(40)[:, None] % 2, corners, corners + torch.rand(40, 2) * 600], 1)
    with torch.no_grad():
        assert boxes._pools_into(levels[0])
        found = pool_rois(levels, rois, 7)
    assert torch.equal(found, pool_rois(levels, rois, 7))
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_rejects_inputs_that_would_access_memory_out_of_bounds() -> None:
    x, output = maps(16, torch.float32), torch.zeros(6, 7, 7, 16)
    wrong = {
        "a row is not in the output": (output, ROWS + 1, x),
        "a row is not in the output ": (output, ROWS - 1, x),
        "rows must be": (output, ROWS[:2], x),
        "rows must be int64": (output, ROWS.int(), x),
        "maps must be": (output, ROWS, x.double()),
        "the output must be": (output.bfloat16(), ROWS, x),
        "the output must be contiguous": (output[:, :, :, :8], ROWS, x[:, :8]),
        "the output must be contiguous .rows": (output[:, :6].contiguous(), ROWS, x),
        "the output must be contiguous .rows, size": (output, ROWS, x[:, :8]),
    }
    for message, (to, rows, values) in wrong.items():
        with pytest.raises(RuntimeError, match=message.strip()):
            roi_align_into(to, rows, values, ROIS, 0.25)
    with pytest.raises(RuntimeError, match="a box has no image"):
        roi_align_into(output, ROWS, x, ROIS + 1, 0.25)
