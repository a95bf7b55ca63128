"""Weights of an adapter around a timm model: the trunk alone, or trunk and adapter in one file."""

import hashlib
import logging
import os
import sys
from collections.abc import Mapping

import torch
from torch import Tensor

from vitadapter_zoo import settings
from vitadapter_zoo.errors import CheckpointError
from vitadapter_zoo.models.trunk import AroundTimm, Trunk
from vitadapter_zoo.text import quoted, shown
from vitadapter_zoo.weights import checkpoint as containers
from vitadapter_zoo.weights import fit
from vitadapter_zoo.weights.pretraining import fetched

logger = logging.getLogger(__name__)

TRUNK = "backbone."
# A file with any of these holds the adapter too.
ADAPTER = ("spm.", "interactions.", "level_embed")
# Parts of a classifier, which the trunk does not have.
HEADS = ("head.", "head_dist.", "fc_norm.", "attn_pool.")
MASK, BIAS, PERIODS = "attn.qkv.bias_mask", "attn.qkv.bias", "rope_embed.periods"
BFLOAT16_STEP = 2.0**-8


def read_backbone(
    network: AroundTimm,
    name: str,
    file: str | os.PathLike[str],
    *,
    cache_dir: settings.Home = None,
    offline: bool | None = None,
    progress: bool = True,
    allow_nonfinite: bool = False,
) -> None:
    """Load a file's weights into an adapter around a timm model, strictly.

    The file holds the trunk alone, or the trunk (under ``backbone.``) and the adapter. The trunk's
    names are timm's or those of the authors that timm's own filter translates, DINOv3's among
    them. The filter also resamples patch and position embeddings of another size.

    Args:
        network: receives the weights; without the adapter's in the file, those stay.
        name: of the network, for errors.
        file: a local ``.pth`` or ``.safetensors`` file, or an http(s) URL.
        cache_dir: where a downloaded file is stored.
        offline: True never uses the network.
        progress: False shows no progress bar.
        allow_nonfinite: accept NaN and infinite values.

    Raises:
        CheckpointError: the file is damaged or unsafe, or its weights are not this network's.
        DownloadError: it cannot be fetched.
        ConfigError: neither a file nor a URL.
    """
    source = os.fspath(file)
    home, without_network = settings.home(cache_dir), settings.is_offline(offline)
    path = fetched(source, home, without_network, progress)
    origin = shown(source, 300)
    tensors = _bare_names(containers.read(path, origin).tensors)
    has_adapter = any(key.startswith(ADAPTER) for key in tensors)
    trunk = {key.removeprefix(TRUNK): x for key, x in tensors.items() if key.startswith(TRUNK)}
    rest = {key: x for key, x in tensors.items() if not key.startswith(TRUNK)}
    if not has_adapter:
        trunk, rest = trunk | rest, {}
    try:
        found = _to_timm(trunk, network.backbone)
        target = network if has_adapter else network.backbone
        if has_adapter:
            found = {TRUNK + key: value for key, value in found.items()} | rest
        fitted = fit.fit(found, target.state_dict(), name, allow_nonfinite=allow_nonfinite)
        periods = _periods(trunk, network.backbone)
    except CheckpointError as error:
        raise CheckpointError(f"{origin}: {error}") from error
    target.load_state_dict(fitted.tensors)
    if periods is not None:
        network.backbone.rope.periods.copy_(periods)
    if not has_adapter:
        logger.info("%s has the trunk only: the adapter's weights stay as they are", origin)


def _bare_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove from the names what wrappers such as DDP add.

    Raises:
        CheckpointError: two names of the file become one.
    """
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        bare = fit.bare_name(name)
        if bare in found:
            raise CheckpointError(f"the file has two values for one name, {quoted(bare)}")
        found[bare] = value
    return found


def _to_timm(tensors: Mapping[str, Tensor], trunk: Trunk) -> dict[str, Tensor]:
    """Convert the trunk's tensors to timm's names.

    Raises:
        CheckpointError: the file holds what the trunk cannot represent.
    """
    kept = {name: x for name, x in tensors.items() if not name.startswith(HEADS)}
    if "storage_tokens" in kept:
        kept = _checked_dinov3(kept, trunk)
    # timm defines the filter next to the class.
    translate = sys.modules[type(trunk).__module__].checkpoint_filter_fn
    try:
        return dict(translate(kept, trunk))
    # A filter expects its own kind of file, and fails in any way on another.
    except (KeyError, ValueError, RuntimeError, AttributeError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"timm cannot read these weights as those of {type(trunk).__name__} "
            f"({type(error).__name__}: {shown(error)}): give the weights of this architecture"
        ) from error


def _checked_dinov3(tensors: Mapping[str, Tensor], trunk: Trunk) -> dict[str, Tensor]:
    """DINOv3's tensors without those that timm drops, after a check that dropping is harmless."""
    kept = {}
    for name, value in tensors.items():
        if name.endswith(MASK):
            wanted = torch.ones(3, value.numel() // 3)
            wanted[1] = 0
            if not torch.equal(value.float().flatten(), wanted.flatten()):
                raise CheckpointError(
                    f"{quoted(name)} masks other biases than those of the keys; timm's model "
                    "cannot represent that"
                )
            continue
        has_biases = getattr(trunk.blocks[0].attn, "q_bias", None) is not None
        if name.endswith(BIAS) and not has_biases:
            queries, _, values = value.chunk(3)
            if queries.any() or values.any():
                raise CheckpointError(
                    f"{quoted(name)} is not zero and the trunk has no such bias: use timm's name "
                    "with qkvb, vit_small_patch16_dinov3_qkvb for instance"
                )
            continue
        kept[name] = value
    return kept


def _periods(tensors: Mapping[str, Tensor], trunk: Trunk) -> Tensor | None:
    """The file's periods of the rotary embedding, which the authors' code uses.

    They are those that timm computes, rounded to bfloat16 in the authors' published files.

    Raises:
        CheckpointError: they are others.
    """
    periods = tensors.get(PERIODS)
    if periods is None:
        return None
    ours = getattr(getattr(trunk, "rope", None), "periods", None)
    if ours is None or ours.shape != periods.shape:
        raise CheckpointError("the file has a rotary embedding of another kind than the trunk")
    if ((periods.float() - ours).abs() > BFLOAT16_STEP * ours).any():
        raise CheckpointError("the file has a rotary embedding of another base than the trunk")
    return periods


def digest(trunk: Trunk) -> str:
    """The sha256 over the names and values of a trunk's state dict."""
    found = hashlib.sha256()
    for name, value in sorted(trunk.state_dict().items()):
        found.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
