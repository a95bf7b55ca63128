"""Operators of the networks; today multi-scale deformable attention alone."""

from vitadapter_zoo.ops.deform_attn import ms_deform_attn

__all__ = ["ms_deform_attn"]
