"""timm's vision transformers as the trunk of an adapter."""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import Format, PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitadapter_zoo.errors import ConfigError, ImageError
from vitadapter_zoo.models.adapter import WithAdapter
from vitadapter_zoo.models.vit import PATCH

FITTING = (
    "an adapter needs a plain vision transformer of timm (class VisionTransformer or Eva) with at "
    "least four blocks and three input channels: DeiT, AugReg, MAE, CLIP, SigLIP, DINOv2, DINOv3 "
    "or EVA-02, timm.list_models('vit_*') for instance"
)
# Begins the names of the trunk's parameters in a detector: its backbone's attribute ``backbone``.
TRUNK = "backbone.backbone."
# timm's VisionTransformer or Eva. Their annotations do not allow what `prepare` changes.
Trunk = Any


def check_kind(vit: nn.Module, name: str | None = None) -> None:
    """Refuse networks that the adapter does not support.

    Args:
        vit: a network.
        name: what the error calls it; by default its class.

    Raises:
        ConfigError: hierarchical or convolutional networks, hybrids, or too few blocks.
    """
    fits = (
        isinstance(vit, (VisionTransformer, Eva))
        and type(vit.patch_embed) is PatchEmbed
        and vit.patch_embed.proj.in_channels == 3
        and len(vit.blocks) >= 4
    )
    if not fits:
        raise ConfigError(f"{name or type(vit).__name__} does not fit: {FITTING}")


def prepare(trunk: Trunk) -> None:
    """Make a timm model accept images of any size, with 16-pixel patches and without its head.

    The model is changed in place. A patch embedding of another size is resampled as timm does
    (FlexiViT, arXiv:2212.08013, section 3.4). The grid of position embeddings stays as it is, and
    timm interpolates it to each image.
    """
    trunk.reset_classifier(0, "")
    trunk.fc_norm = nn.Identity()
    # Patch dropout would leave holes in the maps.
    trunk.patch_drop = None if isinstance(trunk, Eva) else nn.Identity()
    embed = trunk.patch_embed
    if embed.patch_size != (PATCH, PATCH):
        height, width = embed.grid_size
        trunk.set_input_size(img_size=(height * PATCH, width * PATCH), patch_size=(PATCH, PATCH))
    trunk.dynamic_img_size = True
    embed.strict_img_size = False
    embed.flatten = False
    embed.output_fmt = Format.NHWC
    rope: Any = getattr(trunk, "rope", None)
    if getattr(rope, "_use_cached_embed", False):
        # Built for one size of image, this kind returns that size's embeddings for every other.
        rope._use_cached_embed = False
        rope.feat_shape = rope.pos_embed = None


def embed(trunk: Trunk, image: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """Compute the input of the first block, as timm does.

    Args:
        trunk: after `prepare`.
        image: ``[N, 3, H, W]``, sides multiples of 16.

    Returns:
        Prefix and patch tokens ``[N, prefix + H * W / 256, dim]``, and each block's rotary
        embeddings of this image's grid (None without).
    """
    patches = trunk.patch_embed(image)
    embedded = trunk._pos_embed(patches)
    tokens, rope = embedded if type(embedded) is tuple else (embedded, None)
    is_mixed = rope is not None and trunk.rope_mixed
    ropes = list(rope) if is_mixed else [rope] * len(trunk.blocks)
    return trunk.norm_pre(tokens), ropes


def run_block(block: nn.Module, tokens: Tensor, rope: Tensor | None) -> Tensor:
    """Run one of timm's blocks, with global attention, on ``[N, L, dim]``."""
    return block(tokens) if rope is None else block(tokens, rope=rope)


def fill_buffers(network: nn.Module) -> bool:
    """Fill the buffers on the meta device that no state dict holds, in place, on the CPU.

    Returns:
        False where timm cannot fill one of them (before timm 1.0.24).
    """
    for module in network.modules():
        buffers = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
        empty = {name: x for name, x in buffers.items() if x is not None and x.is_meta}
        if not empty:
            continue
        fill = getattr(module, "init_non_persistent_buffers", None)
        if fill is None:
            return False
        for name, buffer in empty.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        fill()
    return True


class AroundTimm(WithAdapter):
    """Base class of adapters around a timm model, which is the attribute ``backbone``.

    Args:
        trunk: a timm model; it is changed in place, see `prepare`.
        frozen: the trunk has no gradients and stays in evaluation mode.

    Attributes:
        read_digest: sha256 over the trunk's weights as they were read from a file of pretrained
            weights, see ``weights.trunks.digest``; None where they were not.

    Raises:
        ConfigError: the model does not fit.
    """

    read_digest: str | None = None

    def __init__(self, trunk: nn.Module, *, frozen: bool) -> None:
        super().__init__()
        check_kind(trunk)
        self.backbone: Trunk = trunk
        prepare(self.backbone)
        self.frozen = frozen
        if frozen:
            trunk.requires_grad_(False)
            trunk.eval()

    def adapter_layers(self) -> list[nn.Module]:
        """All layers except the trunk."""
        return [module for name, module in self.named_children() if name != "backbone"]

    def draw_adapter(self, draw: Callable[[nn.Module], None]) -> None:
        """Draw the adapter's weights with ``draw``; the trunk's weights do not change."""
        for module in self.adapter_layers():
            draw(module)

    def train(self, mode: bool = True) -> "AroundTimm":
        """Set the mode of the adapter, and of the trunk if it is not frozen."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self


def check_image(image: Tensor) -> None:
    """Refuse images that are not ``[N, 3, H, W]`` with sides that are multiples of 32.

    Raises:
        ImageError: with the shape.
    """
    if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] % 32 or image.shape[3] % 32:
        raise ImageError(
            f"images of shape {list(image.shape)}: give [N, 3, H, W] with sides that are multiples "
            "of 32; pad at the bottom and right"
        )


def deform_setting(trunk: Trunk) -> tuple[int, float]:
    """Choose the heads and value width of the deformable attention, as in the published sizes.

    The published T and S have 6 heads and values as wide as the tokens, B and L half as wide with
    as many heads as the trunk (arXiv:2205.08534, table 8).
    """
    dim = trunk.embed_dim
    if dim in (192, 384):
        return 6, 1.0
    attention = getattr(trunk.blocks[0], "attn", None)
    heads = attention.num_heads if attention is not None else max(1, dim // 64)
    ratio = 1.0 if dim < 768 else 0.5
    while int(dim * ratio) % heads:
        heads -= 1
    return heads, ratio


def value_width(dim: int, heads: int, ratio: float) -> int:
    """Width of the deformable attention's values.

    Raises:
        ConfigError: the heads do not divide it.
    """
    width = int(dim * ratio)
    if heads < 1 or width < heads or width % heads:
        raise ConfigError(
            f"{heads} heads do not divide the {width} channels of the deformable attention's "
            f"values ({ratio:g} of {dim}): give other deform_heads or deform_ratio"
        )
    return width
