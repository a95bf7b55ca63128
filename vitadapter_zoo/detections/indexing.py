"""Indices of ``Detections``: integers, slices, bool masks and lists of integers."""

import operator
from typing import Any

import torch
from torch import Tensor

from vitadapter_zoo.text import quoted


def positions(index: Any, count: int) -> Tensor:
    """Convert an index into the positions it selects, int64 ``[M]``, from 0 to ``count - 1``.

    Args:
        index: an integer, a slice, a bool mask ``[count]`` or a list of integers.
        count: how many detections there are.

    Raises:
        IndexError: an integer is out of range, or the mask has another length.
        TypeError: the index is of another kind.
    """
    if isinstance(index, slice):
        return torch.tensor(range(count)[index], dtype=torch.int64, device="cpu")
    # A tensor or array with one bool would pass for an integer too, but is a mask.
    if not getattr(index, "ndim", 0) and hasattr(type(index), "__index__"):
        number = operator.index(index)
        if not -count <= number < count:
            raise IndexError(f"there are {count} detections, none has the index {number}")
        return torch.tensor([number % count], dtype=torch.int64, device="cpu")
    if isinstance(index, (str, bytes, float)):
        raise TypeError(
            "an index is an integer, a slice, a bool mask or a list of integers, not "
            f"{quoted(index)}; with_classes chooses by name"
        )
    chosen = torch.as_tensor(index, device="cpu")
    numbers = torch.arange(count, dtype=torch.int64, device="cpu")
    if chosen.dtype == torch.bool and chosen.shape != (count,):
        raise IndexError(
            f"a mask has one bool for each of the {count} detections, not {list(chosen.shape)}"
        )
    return numbers[chosen if len(chosen) else chosen.long()].reshape(-1)
