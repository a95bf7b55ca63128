"""Faster CPU inference on tokens ``[N, L, C]``: chunked computation and a faster linear layer.

The intermediate results of a whole image are larger than the CPU's caches. They are also larger
than the blocks that the C library reuses, so each allocation would map new pages. Without gradients
the tokens are therefore processed in chunks. ``benchmarks/inference.py`` measures the gain.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Size in bytes of a chunk's largest intermediate result, which is the hidden layer of the
# feed-forward network. glibc returns freed blocks of more than 32 MiB to the system at once.
CHUNK_BYTES = 28 * 2**20
ONEDNN = torch.backends.mkldnn.is_available()


def on_cpu_without_gradients(x: Tensor) -> bool:
    """Return whether this module's faster computations apply to ``x``."""
    return x.device.type == "cpu" and not torch.is_grad_enabled()


def items_per_chunk(x: Tensor, numbers: int) -> int | None:
    """Return how many items of ``x`` to process at a time, or None to process all at once.

    ``numbers`` is the number of values in the intermediate results of a single item.
    """
    if torch.compiler.is_compiling() or not on_cpu_without_gradients(x):
        return None
    return max(1, CHUNK_BYTES // (numbers * x.element_size()))


def in_chunks(
    compute: Callable[..., Tensor], *tokens: Tensor, multiple: int = 1, out: Tensor | None = None
) -> Tensor:
    """Compute ``compute(*tokens)`` in chunks along the tokens.

    Args:
        compute: a function of ``[N, l, ...]`` that returns ``[N, l, ...]``. It processes every
            group of ``multiple`` tokens independently of the others.
        tokens: ``[N, L, ...]``, cut along ``L``.
        multiple: the length of a chunk is a multiple of this.
        out: a tensor that the result may overwrite; it may be one of ``tokens``. By default a new
            tensor is allocated.
    """
    first = tokens[0]
    batch, length, width = first.shape
    limit = items_per_chunk(first, 4 * batch * width)
    if limit is None or length <= limit:
        return compute(*tokens)
    limit = max(1, limit // multiple) * multiple
    count = -(-length // limit)
    size = -(-length // (count * multiple)) * multiple
    whole = out
    for start in range(0, length, size):
        chunk = slice(start, start + size)
        result = compute(*(part[:, chunk] for part in tokens))
        if whole is None:
            whole = result.new_empty(batch, length, *result.shape[2:])
        whole[:, chunk] = result
    return cast("Tensor", whole)


class Linear(nn.Linear):
    """A linear layer on tokens, computed as a 1x1 convolution on the CPU.

    PyTorch uses oneDNN for convolutions and MKL for matrix products. oneDNN multiplies float32
    matrices 5 to 20% faster (measured on an AMD EPYC with AVX-512) and adds the bias in the same
    pass.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``[N, L, in_features]`` to ``[N, L, out_features]``."""
        if not (ONEDNN and on_cpu_without_gradients(tokens)):
            return super().forward(tokens)
        column = tokens.unsqueeze(2).permute(0, 3, 1, 2)
        projected = F.conv2d(column, self.weight[:, :, None, None], self.bias)
        return projected.permute(0, 2, 3, 1).squeeze(2)


class Mlp(nn.Module):
    """The feed-forward network of a transformer block: two linear layers with GELU in between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``[N, L, dim]`` to ``[N, L, dim]``."""
        return self.fc2(self.act(self.fc1(tokens)))
