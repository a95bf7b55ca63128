"""timm's vision transformers, tiny, with weights that make every part of them matter."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.eva import checkpoint_filter_fn
from torch import Tensor, nn

TINY: dict[str, Any] = {"embed_dim": 64, "depth": 4, "num_heads": 2, "num_classes": 0}
# What each is: prefix tokens, patch size and position embeddings differ.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "deit_small_patch16_224": {},
    "deit_small_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "vit_base_patch16_clip_224": {},
    "vit_base_patch16_siglip_224": {},
    "vit_small_patch14_dinov2": {"img_size": 224},
    "vit_small_patch14_reg4_dinov2": {"img_size": 224},
    "eva02_tiny_patch14_224": {},
    "vit_small_patch16_dinov3": {},
    "vit_small_plus_patch16_dinov3_qkvb": {},
    "vit_small_patch16_rope_mixed_224": {},
}


def tiny(name: str, **settings: Any) -> Any:
    """The architecture with few channels and blocks; its weights are always the same."""
    return shaken(fresh(name, **settings))


def fresh(name: str, **settings: Any) -> Any:
    """The same with the weights that timm draws."""
    return timm.create_model(name, **{**TINY, **ARCHITECTURES.get(name, {}), **settings})


def shaken(network: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all parameters, layer scales and norms too, so that none is zero or near."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            is_scale = "gamma" in name
            parameter.copy_(noise * 0.1 + (1.0 if is_norm else 0.5 if is_scale else 0.0))
    return network.eval()


def authors_names(trunk: nn.Module) -> dict[str, Tensor]:
    """A DINOv3 trunk's weights under its authors' names, as their files have them."""
    found: dict[str, Tensor] = {"mask_token": torch.zeros(1, 64)}
    for name, value in trunk.state_dict().items():
        if name.endswith("v_bias"):
            continue
        if name.endswith("q_bias"):
            values = trunk.state_dict()[name.replace("q_bias", "v_bias")]
            base = name.replace("q_bias", "qkv.bias")
            found[base] = torch.cat([value, torch.full_like(value, 7.0), values])
            mask = torch.ones(3, len(value))
            mask[1] = 0
            found[f"{base}_mask"] = mask.flatten()
            continue
        renamed = name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        found[renamed.replace("reg_token", "storage_tokens")] = value
    found["rope_embed.periods"] = trunk.rope.periods.clone()  # type: ignore[union-attr,operator]
    return found


def save(tensors: dict[str, Tensor], path: Path) -> Path:
    torch.save({name: value.clone() for name, value in tensors.items()}, path)
    return path


def filtered(tensors: dict[str, Tensor], trunk: nn.Module) -> dict[str, Tensor]:
    """What timm's own filter makes of the authors' names."""
    return dict(checkpoint_filter_fn(dict(tensors), trunk))
