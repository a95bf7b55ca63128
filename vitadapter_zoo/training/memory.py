"""Less memory for more computing: blocks whose activations are computed again when needed."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from vitadapter_zoo.errors import ZooError


def checkpoint_blocks(backbone: nn.Module) -> int:
    """Let every transformer block keep its input only, and compute again in the backward pass.

    State-dict names, results and random draws stay the same.

    Args:
        backbone: with its blocks in ``blocks`` or ``layers``.

    Returns:
        How many blocks there are.

    Raises:
        ZooError: the backbone has no blocks.
    """
    blocks = getattr(backbone, "blocks", None) or getattr(backbone, "layers", None)
    if blocks is None:
        raise ZooError(f"{type(backbone).__name__} has no blocks to checkpoint")
    for block in blocks:
        block.forward = partial(_forward, block.forward)
    return len(blocks)


def _forward(forward: Any, *inputs: Any) -> Any:
    return checkpoint(forward, *inputs, use_reentrant=False)
