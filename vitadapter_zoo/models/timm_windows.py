"""Windowed attention in timm's blocks, as the published networks have it (section 4.1)."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor

from vitadapter_zoo.models.vit import WINDOW, from_windows, pad_to_windows, to_windows


def can_be_windowed(block: Any) -> bool:
    """Return whether `run_windowed` computes the same as the block, apart from the windows."""
    return type(block) in (Block, EvaBlock) and type(block.attn) in (Attention, EvaAttention)


def run_windowed(
    block: Any,
    tokens: Tensor,
    rope: Tensor | None,
    prefix: int,
    height: int,
    width: int,
) -> Tensor:
    """Run a timm block with attention in 14x14 windows.

    Patches attend to their window and to the prefix tokens, and prefix tokens to everything.

    Args:
        block: one for which `can_be_windowed` is true.
        tokens: ``[N, prefix + height * width, dim]``.
        rope: rotary embeddings of the patches, or None.
        prefix: number of prefix tokens.
        height: of the grid of patches.
        width: of the grid of patches.
    """
    attended = _windowed_attention(block.attn, block.norm1(tokens), rope, prefix, height, width)
    if isinstance(block, EvaBlock):
        if block.gamma_1 is not None:
            attended = block.gamma_1 * attended
        tokens = tokens + block.drop_path1(attended)
        fed = block.mlp(block.norm2(tokens))
        if block.gamma_2 is not None:
            fed = block.gamma_2 * fed
        return tokens + block.drop_path2(fed)
    tokens = tokens + block.drop_path1(block.ls1(attended))
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))


def _windowed_attention(
    attn: Any,
    x: Tensor,
    rope: Tensor | None,
    prefix: int,
    height: int,
    width: int,
) -> Tensor:
    q, k, v = _projected(attn, x)
    if rope is not None:
        half = getattr(attn, "rotate_half", False)
        q, k = (
            torch.cat(
                [part[:, :, :prefix], apply_rot_embed_cat(part[:, :, prefix:], rope, half=half)],
                dim=2,
            ).type_as(v)
            for part in (q, k)
        )
    heads, batch = q.shape[1], x.shape[0]
    dropout = attn.attn_drop.p if attn.training else 0.0

    def windows(part: Tensor) -> Tensor:
        # This pads the projected map without a mask, as the published networks do.
        grid = part[:, :, prefix:].transpose(1, 2).flatten(2).unflatten(1, (height, width))
        cut = to_windows(pad_to_windows(grid, WINDOW), WINDOW)
        return cut.unflatten(-1, (heads, -1)).transpose(1, 2)

    queries, keys, values = windows(q), windows(k), windows(v)
    if prefix:
        count = queries.shape[0] // batch
        keys = torch.cat([k[:, :, :prefix].repeat_interleave(count, 0), keys], dim=2)
        values = torch.cat([v[:, :, :prefix].repeat_interleave(count, 0), values], dim=2)
    patches = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout)
    padded = (height + -height % WINDOW, width + -width % WINDOW)
    merged = from_windows(patches.transpose(1, 2).flatten(2), WINDOW, batch, *padded)
    attended = merged[:, :height, :width].flatten(1, 2)
    if prefix:
        first = F.scaled_dot_product_attention(q[:, :, :prefix], k, v, dropout_p=dropout)
        attended = torch.cat([first.transpose(1, 2).flatten(2), attended], dim=1)
    attended = attn.norm(attended)
    gate = getattr(attn, "gate", None)
    if gate is not None:
        attended = attended * gate(x).sigmoid()
    return attn.proj_drop(attn.proj(attended))


def _projected(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute queries, keys and values of ``[N, L, dim]``, each ``[N, heads, L, channels]``."""
    if attn.qkv is None:
        parts = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    else:
        bias = attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        parts = F.linear(x, attn.qkv.weight, bias).chunk(3, dim=-1)  # type: ignore[assignment]
    q, k, v = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in parts)
    return attn.q_norm(q), attn.k_norm(k), v
