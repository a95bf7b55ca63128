"""The operators that have compiled kernels: deformable attention, mask pasting and RoIAlign.

`accelerate` and `restore` put the first of them into models of other projects and take it out.
"""

import importlib
from typing import TYPE_CHECKING, Any

from vitadapter_zoo.ops.deform_attn import ms_deform_attn
from vitadapter_zoo.ops.fused import ms_deform_attn_fused
from vitadapter_zoo.ops.masks import paste_masks, paste_rle

if TYPE_CHECKING:
    from vitadapter_zoo.ops.replacement import accelerate, restore

__all__ = [
    "accelerate",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "paste_masks",
    "paste_rle",
    "restore",
]


def __getattr__(name: str) -> Any:
    if name in ("accelerate", "restore"):
        return getattr(importlib.import_module("vitadapter_zoo.ops.replacement"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
