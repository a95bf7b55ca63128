"""Activation checkpointing: less memory for more computation."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.models import DINOv3Adapter, TimmViTAdapter
from vitadapter_zoo.models.adapter import Extractor, Injector
from vitadapter_zoo.models.trunk import AroundTimm


def checkpoint_blocks(backbone: nn.Module) -> int:
    """Make blocks store only their input and recompute the rest in the backward pass.

    These are the transformer blocks, and the adapter's injectors and extractors, whose maps are
    five times as many tokens. State-dict names, results and random draws stay the same.

    The blocks of DINOv3's frozen trunk are left out, because they keep nothing.

    Args:
        backbone: with its blocks in ``blocks`` or ``layers``, or an adapter around a timm model.

    Returns:
        The number of modules that are recomputed.

    Raises:
        ZooError: the backbone has no blocks, or windows in a timm trunk.
    """
    trunk = backbone.backbone if isinstance(backbone, AroundTimm) else backbone
    blocks = getattr(trunk, "blocks", None) or getattr(trunk, "layers", None)
    if isinstance(backbone, DINOv3Adapter) and backbone.frozen:
        blocks = ()
    if isinstance(backbone, TimmViTAdapter) and any(backbone.windows):
        raise ZooError(
            "--checkpoint-blocks does not work with windows in a timm trunk: leave one of the two "
            "out"
        )
    if blocks is None:
        raise ZooError(f"{type(backbone).__name__} has no blocks to checkpoint")
    adapters = [x for x in backbone.modules() if isinstance(x, (Injector, Extractor))]
    for module in (*blocks, *adapters):
        module.forward = partial(_forward, module.forward)
    return len(blocks) + len(adapters)


def _forward(forward: Any, *inputs: Any, **named: Any) -> Any:
    return checkpoint(forward, *inputs, use_reentrant=False, **named)
