"""How tokens ``[N, L, C]`` are worked on: on the CPU, without gradients, a piece at a time.

A whole image's intermediate results are larger than the caches, and larger than what the C library
keeps between two uses: they would be read from memory, and paged in anew, every time.
``benchmarks/inference.py`` measures what it brings.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Bytes of a piece's largest intermediate result, the feed-forward network's four times as wide one.
# glibc hands back to the system at once what is larger than 32 MiB.
PIECE = 28 * 2**20
ONEDNN = torch.backends.mkldnn.is_available()


def on_cpu_without_gradients(x: Tensor) -> bool:
    """Whether ``x`` is where the ways of this module pay and may be taken."""
    return x.device.type == "cpu" and not torch.is_grad_enabled()


def at_a_time(x: Tensor, numbers: int) -> int | None:
    """How many parts of ``x`` to work on at a time, where one of them leads to so many numbers.

    None where it is best to take all of them together.
    """
    if torch.compiler.is_compiling() or not on_cpu_without_gradients(x):
        return None
    return max(1, PIECE // (numbers * x.element_size()))


def by_pieces(
    compute: Callable[..., Tensor], *tokens: Tensor, multiple: int = 1, out: Tensor | None = None
) -> Tensor:
    """``compute(*tokens)``, for a function that treats every ``multiple`` tokens by themselves.

    Args:
        compute: takes ``[N, l, ...]`` of each of ``tokens`` and gives ``[N, l, ...]``.
        tokens: ``[N, L, ...]``, cut along ``L``.
        multiple: pieces are cut at multiples of it only.
        out: where pieces may be put, instead of into a new tensor; may be one of ``tokens``.
    """
    first = tokens[0]
    batch, length, width = first.shape
    limit = at_a_time(first, 4 * batch * width)
    if limit is None or length <= limit:
        return compute(*tokens)
    limit = max(1, limit // multiple) * multiple
    count = -(-length // limit)
    size = -(-length // (count * multiple)) * multiple
    whole = out
    for start in range(0, length, size):
        piece = slice(start, start + size)
        result = compute(*(part[:, piece] for part in tokens))
        if whole is None:
            whole = result.new_empty(batch, length, *result.shape[2:])
        whole[:, piece] = result
    return cast("Tensor", whole)


class Linear(nn.Linear):
    """A linear layer on tokens; on the CPU it is a convolution of a map one pixel wide.

    oneDNN, which convolves, multiplies float32 matrices 5 to 20% faster than MKL (measured on an
    AMD EPYC with AVX-512) and adds the bias on the way.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        """``[N, L, in_features]`` to ``[N, L, out_features]``."""
        if not (ONEDNN and on_cpu_without_gradients(tokens)):
            return super().forward(tokens)
        column = tokens.unsqueeze(2).permute(0, 3, 1, 2)
        projected = F.conv2d(column, self.weight[:, :, None, None], self.bias)
        return projected.permute(0, 2, 3, 1).squeeze(2)


class Mlp(nn.Module):
    """Two linear layers with GELU in between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[N, L, dim]`` to the same."""
        return self.fc2(self.act(self.fc1(tokens)))
