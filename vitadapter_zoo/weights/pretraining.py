"""The pretrained weights that training starts from: the trunk's, without the adapter."""

import logging
import math
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitadapter_zoo import settings
from vitadapter_zoo.errors import CheckpointError, ConfigError, DownloadError
from vitadapter_zoo.models.vit import PATCH
from vitadapter_zoo.text import PATH, shown
from vitadapter_zoo.weights import atomic, cache
from vitadapter_zoo.weights import checkpoint as containers
from vitadapter_zoo.weights.fit import unwrap
from vitadapter_zoo.weights.progress import bars
from vitadapter_zoo.weights.source import LocalFile, Url, parse

logger = logging.getLogger(__name__)

# Names of the trunk's parameters, which the pretraining has too.
TRUNK = ("patch_embed.", "pos_embed", "blocks.", "visual_embed.", "layers.")
# The original does not ask for these: DeiT has none, and its blocks start from ones.
LAYER_SCALES = ("gamma1", "gamma2", "gamma_1", "gamma_2")
# DINOv2's names within a block, and ours.
DINOV2_SCALES = {".ls1.gamma": ".gamma1", ".ls2.gamma": ".gamma2"}
# JAX's names within a block, and ours.
JAX_NORMS = {"LayerNorm_0": "norm1", "LayerNorm_2": "norm2"}
JAX_LAYERS = {"MlpBlock_3/Dense_0": "mlp.fc1", "MlpBlock_3/Dense_1": "mlp.fc2"}
MOST_EXPANSION = 4  # weights are hardly smaller when they are compressed
JAX_ATTENTION = "MultiHeadDotProductAttention_1"


def read_pretraining(
    network: nn.Module,
    pretrained: str | None,
    *,
    resize_positions: bool = False,
    cache_dir: settings.Home = None,
    offline: bool | None = None,
    progress: bool = True,
) -> None:
    """Copy the trunk's parameters from its pretraining; the adapter's do not change.

    Args:
        network: a backbone.
        pretrained: file or http(s) URL of DeiT's, Uni-Perceiver's, DINOv2's or AugReg's form
            (``.npz``); None does nothing.
        resize_positions: take position embeddings of another grid too, resized (bicubic) as the
            network itself resizes them to each image.
        cache_dir: where a downloaded file is kept, as for ``load``.
        offline: True never uses the network; by default what ``VITADAPTER_ZOO_OFFLINE`` says.
        progress: False shows no progress bar.

    Raises:
        CheckpointError: the file cannot be read, or is not the trunk's.
        DownloadError: it cannot be fetched.
        ConfigError: neither a file nor a URL.
    """
    if pretrained is None:
        return
    path = fetched(pretrained, settings.home(cache_dir), settings.is_offline(offline), progress)
    found = _from_jax(path, pretrained) if _is_npz(path) else _read(path, pretrained)
    trunk = {name: x for name, x in network.named_parameters() if name.startswith(TRUNK)}
    found = dict(unwrap(found, trunk)[0])
    if resize_positions and "pos_embed" in trunk and "pos_embed" in found:
        found["pos_embed"] = _resized_positions(found["pos_embed"], trunk["pos_embed"])
    absent = [name for name in trunk if name not in found]
    misshaped = [name for name in trunk if name in found and trunk[name].shape != found[name].shape]
    scales = [name for name in absent if name.endswith(LAYER_SCALES)]
    if misshaped or len(scales) < len(absent):
        wrong = [name for name in absent if name not in scales] + misshaped
        raise CheckpointError(
            f"{shown(pretrained, PATH)} is not the pretraining of this backbone: {len(wrong)} "
            "parameters are "
            f"absent or of another shape, {_few(wrong)}"
        )
    if scales:
        logger.info("%s has no layer scales; they start as they are: %s", pretrained, scales[0])
    with torch.no_grad():
        for name, parameter in trunk.items():
            if name in found:
                parameter.copy_(found[name])
    logger.info("%s: %d parameters, not used: %s", pretrained, len(trunk) - len(scales),
                _few(name for name in found if name not in trunk))  # fmt: skip


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(map(shown, listed[:4])) + (", ..." if len(listed) > 4 else "")


def _read(path: Path, origin: str) -> dict[str, Tensor]:
    tensors = containers.read(path, origin).tensors
    tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return _from_dinov2(tensors) if "blocks.0.ls1.gamma" in tensors else tensors


def _from_dinov2(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert DINOv2's tensors (arXiv:2304.07193) to the trunk's names and 16-pixel patches.

    DINOv2's patches have 14 pixels. The published detectors started from kernels that were resized
    bilinearly (align_corners False), without a correction of their scale.
    """
    renamed = {}
    for name, value in tensors.items():
        for theirs, ours in DINOV2_SCALES.items():
            name = name.replace(theirs, ours)
        renamed[name] = value
    kernel = renamed.get("patch_embed.proj.weight")
    if kernel is not None and kernel.ndim == 4:
        size = (PATCH, PATCH)
        resized = F.interpolate(kernel.float(), size, mode="bilinear", align_corners=False)
        renamed["patch_embed.proj.weight"] = resized
    return renamed


def _resized_positions(found: Tensor, wanted: Tensor) -> Tensor:
    """Position embeddings ``[1, 1 + side * side, C]`` for the grid of ``wanted``, ``[1, n, C]``."""
    if found.shape == wanted.shape or found.ndim != 3 or found.shape[2] != wanted.shape[2]:
        return found
    old, new = (round((x.shape[1] - 1) ** 0.5) for x in (found, wanted))
    if (1 + old**2, 1 + new**2) != (found.shape[1], wanted.shape[1]):
        return found
    grid = found[:, 1:].float().unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    return torch.cat([found[:, :1].float(), grid.flatten(2).transpose(1, 2)], dim=1)


def _is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return False
    return bool(names) and all(name.endswith(".npy") for name in names)


def _from_jax(path: Path, origin: str) -> dict[str, Tensor]:
    """Convert AugReg's arrays (arXiv:2106.10270) to the trunk's names.

    Raises:
        CheckpointError: the file is damaged, or holds something else.
    """
    try:
        _check_sizes(path)
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: torch.from_numpy(archive[name]) for name in archive.files}
        # A kernel is [height, width, in, out] of a convolution, [in, out] of a linear layer.
        tensors = {
            "patch_embed.proj.weight": arrays["embedding/kernel"].permute(3, 2, 0, 1),
            "patch_embed.proj.bias": arrays["embedding/bias"],
            "pos_embed": arrays["Transformer/posembed_input/pos_embedding"],
        }
        depth = 0
        while f"Transformer/encoderblock_{depth}/LayerNorm_0/scale" in arrays:
            source, target = f"Transformer/encoderblock_{depth}", f"blocks.{depth}"
            tensors.update(_jax_block(arrays, source, target))
            depth += 1
    # A damaged archive makes numpy and zipfile raise almost any exception.
    except Exception as error:
        raise CheckpointError(
            f"{origin} is not a vision transformer of JAX's ({type(error).__name__}: "
            f"{shown(error)}); "
            "download it again, or give another file"
        ) from error
    return tensors


def _check_sizes(path: Path) -> None:
    """Refuse an archive whose arrays would take far more memory than the file has bytes.

    Raises:
        ValueError: so it is, compressed or by the claim of an array's header.
    """
    limit = MOST_EXPANSION * path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
        for name in archive.namelist():
            with archive.open(name) as file:
                version = np.lib.format.read_magic(file)
                reader = (np.lib.format.read_array_header_1_0 if version == (1, 0)
                          else np.lib.format.read_array_header_2_0)  # fmt: skip
                shape, _, dtype = reader(file)
                size = max(size, math.prod(shape) * dtype.itemsize)
    if size > limit:
        raise ValueError(f"its arrays claim {size:,} bytes, and the file has fewer")


def _jax_block(arrays: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    tensors = {}
    for theirs, ours in JAX_NORMS.items():
        tensors[f"{target}.{ours}.weight"] = arrays[f"{source}/{theirs}/scale"]
        tensors[f"{target}.{ours}.bias"] = arrays[f"{source}/{theirs}/bias"]
    for theirs, ours in JAX_LAYERS.items():
        tensors[f"{target}.{ours}.weight"] = arrays[f"{source}/{theirs}/kernel"].T
        tensors[f"{target}.{ours}.bias"] = arrays[f"{source}/{theirs}/bias"]
    attention = f"{source}/{JAX_ATTENTION}"
    # [dim, heads, width of a head]; out is [heads, width of a head, dim].
    kernels = [arrays[f"{attention}/{name}/kernel"] for name in ("query", "key", "value")]
    biases = [arrays[f"{attention}/{name}/bias"] for name in ("query", "key", "value")]
    tensors[f"{target}.attn.qkv.weight"] = torch.cat([x.flatten(1).T for x in kernels])
    tensors[f"{target}.attn.qkv.bias"] = torch.cat([x.flatten() for x in biases])
    tensors[f"{target}.attn.proj.weight"] = arrays[f"{attention}/out/kernel"].flatten(0, 1).T
    tensors[f"{target}.attn.proj.bias"] = arrays[f"{attention}/out/bias"]
    return tensors


def fetched(pretrained: str, home: Path, offline: bool, progress: bool) -> Path:
    """Return the file, downloaded into the cache if it is a URL.

    Raises:
        ConfigError: neither a file nor a URL.
        DownloadError: it cannot be fetched.
    """
    source = parse(pretrained)
    if isinstance(source, LocalFile):
        return source.path
    if not isinstance(source, Url):
        raise ConfigError(f"{pretrained!r} is neither a file nor an http(s) URL")
    from vitadapter_zoo.weights.download import download, hash_in_name

    target = home / "pretraining" / source.url.rpartition("/")[2]
    with cache.locked(home, f"pretraining-{target.name}"), bars(progress) as lines:
        if not target.exists():
            if offline:
                raise DownloadError(f"{source} is not in {target.parent}, and this is offline mode")
            with atomic.writing_to(target.parent):
                target.parent.mkdir(parents=True, exist_ok=True)
            download(source.url, target, hash_in_name(source.url), report=lines(target.name))
    return target
