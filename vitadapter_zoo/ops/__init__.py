"""The operators that have compiled kernels: deformable attention, mask pasting and RoIAlign."""

from vitadapter_zoo.ops.deform_attn import ms_deform_attn
from vitadapter_zoo.ops.fused import ms_deform_attn_fused
from vitadapter_zoo.ops.masks import paste_masks, paste_rle

__all__ = ["ms_deform_attn", "ms_deform_attn_fused", "paste_masks", "paste_rle"]
