"""Operators of the networks: multi-scale deformable attention, plain and fused."""

from vitadapter_zoo.ops.deform_attn import ms_deform_attn
from vitadapter_zoo.ops.fused import ms_deform_attn_fused

__all__ = ["ms_deform_attn", "ms_deform_attn_fused"]
