"""The plain ViT: the trunk that the adapter extends, and the detector backbone without adapter."""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from vitadapter_zoo.models.constants import kept
from vitadapter_zoo.models.pyramid import Pyramid
from vitadapter_zoo.models.tokens import Linear, Mlp, in_chunks, on_cpu_without_gradients
from vitadapter_zoo.ops.library import AMX

PATCH = 16
WINDOW = 14  # as in ViTDet, a window is as large as the pretraining grid at 224 pixels
LAYER_NORM_EPS = 1e-6
QUERIES = 1900  # queries per step of global attention; limits its weights to 14 MB of memory


def to_windows(x: Tensor, size: int) -> Tensor:
    """Cut ``[N, H, W, C]`` (H, W multiples of ``size``) into ``[windows, size * size, C]``."""
    n, h, w, c = x.shape
    x = x.view(n, h // size, size, w // size, size, c)
    return x.transpose(2, 3).reshape(-1, size * size, c)


def from_windows(windows: Tensor, size: int, batch: int, height: int, width: int) -> Tensor:
    """Undo ``to_windows``; return ``[batch, height, width, C]``."""
    x = windows.view(batch, height // size, width // size, size, size, -1)
    return x.transpose(2, 3).reshape(batch, height, width, -1)


def pad_to_windows(x: Tensor, size: int) -> Tensor:
    """Zero-pad ``[N, H, W, C]`` at the bottom and right to multiples of ``size``."""
    height, width = x.shape[1:3]
    return F.pad(x, (0, 0, 0, -width % size, 0, -height % size))


def self_attention(qkv: Tensor, heads: int) -> Tensor:
    """Compute softmax attention from ``[N, L, 3 * C]`` (q, k and v); return ``[N, L, C]``."""
    n, length, channels = qkv.shape
    q, k, v = qkv.view(n, length, 3, heads, channels // (3 * heads)).permute(2, 0, 3, 1, 4)
    if qkv.dtype == torch.bfloat16 and on_cpu_without_gradients(qkv) and not AMX:
        attended = _attention_of_products(q, k, v)
    else:
        attended = F.scaled_dot_product_attention(q, k, v)
    return attended.transpose(1, 2).reshape(n, length, -1)


def _attention_of_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute softmax attention over ``[N, heads, L, C]`` by two matrix products.

    On CPUs without AMX, PyTorch's fused attention is not faster in bfloat16 than in float32, but
    matrix products are. With AMX, PyTorch's fused attention takes a third of this function's time.
    """
    n, heads, length, channels = q.shape
    keys = (k * channels**-0.5).transpose(-2, -1)
    if length <= WINDOW**2:
        return (q @ keys).softmax(dim=-1) @ v
    attended = q.new_empty(n, length, heads, channels).transpose(1, 2)
    for head in range(heads):
        for start in range(0, length, QUERIES):
            chunk = slice(start, start + QUERIES)
            weights = (q[:, head, chunk] @ keys[:, head]).softmax(dim=-1)
            attended[:, head, chunk] = weights @ v[:, head]
    return attended


def resized_position_embedding(embedding: Tensor, height: int, width: int) -> Tensor:
    """Resize square ``[side * side, C]`` position embeddings to ``[1, height * width, C]``."""
    side = int(embedding.shape[0] ** 0.5)
    # Always in float32: bicubic weights would lose too much precision in bfloat16.
    if embedding.device.type == "cuda":
        grid = _resized_by_products(embedding.float().view(side, side, -1), height, width)
        return grid.view(1, height * width, -1).to(embedding.dtype)
    grid = embedding.view(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), (height, width), mode="bicubic", align_corners=False)
    return grid.flatten(2).transpose(1, 2).to(embedding.dtype)


def _resized_by_products(grid: Tensor, height: int, width: int) -> Tensor:
    """Resize ``[side, side, C]`` to ``[height, width, C]`` by two matrix products.

    PyTorch's bicubic kernel takes 0.57 ms on an H100 for the network T, and its gradient is not
    deterministic.
    """
    rows = bicubic_weights(grid.shape[0], height, grid.device)
    columns = bicubic_weights(grid.shape[1], width, grid.device)
    tall = (rows @ grid.flatten(1)).view(height, *grid.shape[1:])
    return columns @ tall


@kept(32)
def bicubic_weights(side: int, size: int, device: torch.device) -> Tensor:
    """Return the matrix ``[size, side]``, float32, with which bicubic interpolation resizes."""
    identity = torch.eye(side, dtype=torch.float32, device="cpu")[None, None]
    weights = F.interpolate(identity, (size, side), mode="bicubic", align_corners=False)
    return weights[0, 0].to(device)


def channels_last(image: Tensor) -> Tensor:
    """Convert an image to channels-last, the memory order of tokens.

    Convolutions keep the memory order of their input, so tokens and maps convert to each other
    without a copy. On the CPU all but the narrowest convolutions are also faster in this order.
    """
    return image.contiguous(memory_format=torch.channels_last)


def tokens_to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """View tokens ``[N, H * W, C]`` in row-major order as a map ``[N, C, H, W]``."""
    # With this order of operations the strides are channels-last for a batch of size 1 too.
    # Kernels choose their memory format by the strides.
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def drop_path_rates(maximum: float, depth: int) -> list[float]:
    """Return stochastic-depth rates that rise linearly from 0 to ``maximum`` over the blocks."""
    return [maximum * index / max(depth - 1, 1) for index in range(depth)]


class PatchEmbed(nn.Module):
    """Embed 16x16 patches as tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=PATCH, stride=PATCH)

    def forward(self, image: Tensor) -> Tensor:
        """Map images ``[N, 3, 16 H, 16 W]`` to tokens ``[N, H * W, dim]``."""
        return self.proj(channels_last(image)).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention, global or in 14x14 windows."""

    def __init__(self, dim: int, heads: int, windowed: bool) -> None:
        super().__init__()
        self.heads = heads
        self.windowed = windowed
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Map ``[N, height * width, dim]`` to the same shape."""
        qkv = in_chunks(self.qkv, x)
        if self.windowed:
            # This pads the *projected* map without a mask: padded tokens take part in the softmax
            # with key = value = 0, as in training. Masking them would change the result.
            padded = pad_to_windows(qkv.unflatten(1, (height, width)), WINDOW)
            windows = self_attention(to_windows(padded, WINDOW), self.heads)
            merged = from_windows(windows, WINDOW, x.shape[0], *padded.shape[1:3])
            attended = merged[:, :height, :width].flatten(1, 2)
        else:
            attended = self_attention(qkv, self.heads)
        return in_chunks(self.proj, attended)


class Block(nn.Module):
    """Pre-norm transformer block with layer scale (CaiT, arXiv:2103.17239, section 2)."""

    def __init__(self, dim: int, heads: int, windowed: bool, drop_path: float) -> None:
        super().__init__()
        self.gamma1 = nn.Parameter(torch.ones(dim))
        self.gamma2 = nn.Parameter(torch.ones(dim))
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, heads, windowed)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Map ``[N, height * width, dim]`` to the same shape."""
        if self.attn.windowed:  # rows of windows do not depend on each other
            return in_chunks(partial(self._forward, width=width), x, multiple=WINDOW * width)
        return self._forward(x, width)

    def _forward(self, x: Tensor, width: int) -> Tensor:
        attended = self.attn(self.norm1(x), x.shape[1] // width, width)
        x = x + self.drop_path(self.gamma1 * attended)
        return in_chunks(lambda x: x + self.drop_path(self.gamma2 * self.mlp(self.norm2(x))), x)


class VisionTransformer(nn.Module):
    """The trunk that the plain and the adapter backbone share: embedding, positions, blocks.

    Args:
        dim: width of the tokens.
        heads: attention heads.
        windows: one flag per block, True for 14x14 windowed attention, False for global.
        pretrain_grid: side of the square grid that ``pos_embed`` was trained on.
        drop_path: largest stochastic-depth rate (training only).
    """

    def __init__(
        self, dim: int, heads: int, windows: tuple[bool, ...], pretrain_grid: int, drop_path: float
    ) -> None:
        super().__init__()
        # Index 0 is the position of the class token, which detection does not use.
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + pretrain_grid**2, dim))
        self.patch_embed = PatchEmbed(dim)
        rates = drop_path_rates(drop_path, len(windows))
        self.blocks = nn.ModuleList(
            Block(dim, heads, windowed, rate) for windowed, rate in zip(windows, rates, strict=True)
        )
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def embed(self, image: Tensor) -> Tensor:
        """Embed images ``[N, 3, 16 H, 16 W]`` as tokens with positions, ``[N, H * W, dim]``."""
        height, width = image.shape[2] // PATCH, image.shape[3] // PATCH
        positions = resized_position_embedding(self.pos_embed[0, 1:], height, width)
        return self.patch_embed(image) + positions


class ViTBaseline(Pyramid, VisionTransformer):
    """The plain ViT detector backbone.

    Outputs of four depths are resized to strides 4, 8, 16 and 32.
    """

    def __init__(
        self, dim: int, heads: int, windows: tuple[bool, ...], pretrain_grid: int, drop_path: float
    ) -> None:
        super().__init__(dim, heads, windows, pretrain_grid, drop_path)
        self.width = dim
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.norm3 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.norm4 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.up1 = nn.Sequential(
            nn.ConvTranspose2d(dim, dim, 2, 2),
            nn.GroupNorm(32, dim),
            nn.GELU(),
            nn.ConvTranspose2d(dim, dim, 2, 2),
        )
        self.up2 = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.up3 = nn.Identity()
        self.up4 = nn.MaxPool2d(2, 2)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Compute maps ``[N, dim, H / s, W / s]``, s = 4, 8, 16, 32, from images ``[N, 3, H, W]``.

        ``H`` and ``W`` are multiples of 32.
        """
        height, width = image.shape[2] // PATCH, image.shape[3] // PATCH
        x = self.embed(image)
        quarter = len(self.blocks) // 4
        norms = (self.norm1, self.norm2, self.norm3, self.norm4)
        scalers = (self.up1, self.up2, self.up3, self.up4)
        maps = []
        for index, (norm, scale) in enumerate(zip(norms, scalers, strict=True)):
            for block in self.blocks[index * quarter : (index + 1) * quarter]:
                x = block(x, height, width)
            maps.append(scale(tokens_to_map(norm(x), height, width)))
        return [maps[index] for index in self.out_indices]
