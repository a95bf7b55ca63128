"""The pretrained weights that training starts from: the trunk's, without the adapter."""

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from vitadapter_zoo import settings
from vitadapter_zoo.errors import CheckpointError, ConfigError, DownloadError
from vitadapter_zoo.weights import atomic, cache
from vitadapter_zoo.weights import checkpoint as containers
from vitadapter_zoo.weights.progress import bars
from vitadapter_zoo.weights.source import LocalFile, Url, parse

logger = logging.getLogger(__name__)

# Names of the trunk's parameters, which the pretraining has too.
TRUNK = ("patch_embed.", "pos_embed", "blocks.", "visual_embed.", "layers.")
# The original does not ask for these: DeiT has none, and its blocks start from ones.
LAYER_SCALES = ("gamma1", "gamma2", "gamma_1", "gamma_2")


def read_pretraining(network: nn.Module, pretrained: str | None) -> None:
    """Copy the trunk's parameters from its pretraining; the adapter's stay as they are.

    Args:
        network: a backbone.
        pretrained: file or http(s) URL; None does nothing.

    Raises:
        CheckpointError: the file cannot be read, or is not the trunk's.
        DownloadError: it cannot be fetched.
        ConfigError: neither a file nor a URL.
    """
    if pretrained is None:
        return
    path = _fetched(pretrained)
    trunk = {name: x for name, x in network.named_parameters() if name.startswith(TRUNK)}
    found = containers.read(path, pretrained).tensors
    found = {name.removeprefix("module."): value for name, value in found.items()}
    absent = [name for name in trunk if name not in found]
    misshaped = [name for name in trunk if name in found and trunk[name].shape != found[name].shape]
    scales = [name for name in absent if name.endswith(LAYER_SCALES)]
    if misshaped or len(scales) < len(absent):
        wrong = [name for name in absent if name not in scales] + misshaped
        raise CheckpointError(
            f"{pretrained} is not the pretraining of this backbone: {len(wrong)} parameters are "
            f"absent or of another shape, {_few(wrong)}"
        )
    if scales:
        logger.warning("%s has no layer scales; they start as they are: %s", pretrained, scales[0])
    with torch.no_grad():
        for name, parameter in trunk.items():
            if name in found:
                parameter.copy_(found[name])
    logger.info("%s: %d parameters, not used: %s", pretrained, len(trunk) - len(scales),
                _few(name for name in found if name not in trunk))  # fmt: skip


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:4]) + (", ..." if len(listed) > 4 else "")


def _fetched(pretrained: str) -> Path:
    """The file, downloaded into the cache if it is a URL."""
    source = parse(pretrained)
    if isinstance(source, LocalFile):
        return source.path
    if not isinstance(source, Url):
        raise ConfigError(f"pretrained={pretrained!r} is neither a file nor an http(s) URL")
    from vitadapter_zoo.weights.download import download, hash_in_name

    target = settings.home() / "pretraining" / source.url.rpartition("/")[2]
    with cache.locked(settings.home(), f"pretraining-{target.name}"), bars() as lines:
        if not target.exists():
            if settings.is_offline():
                raise DownloadError(f"{source} is not in {target.parent}, and this is offline mode")
            with atomic.writing_to(target.parent):
                target.parent.mkdir(parents=True, exist_ok=True)
            download(source.url, target, hash_in_name(source.url), report=lines(target.name))
    return target
