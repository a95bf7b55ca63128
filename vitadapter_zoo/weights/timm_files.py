"""The files of timm's pretrained weights: where they are, which they are, and their licence."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from torch import Tensor

from vitadapter_zoo import settings
from vitadapter_zoo.catalog import Row
from vitadapter_zoo.errors import CheckpointError, ConfigError, DownloadError
from vitadapter_zoo.models.around import build_around, pretraining
from vitadapter_zoo.models.trunk import TRUNK, AroundTimm
from vitadapter_zoo.text import PATH, shown
from vitadapter_zoo.timm_detector import TimmDetector
from vitadapter_zoo.weights import atomic, hub
from vitadapter_zoo.weights.pretraining import fetched
from vitadapter_zoo.weights.progress import bars
from vitadapter_zoo.weights.source import HubFile
from vitadapter_zoo.weights.trunks import digest, read_backbone

logger = logging.getLogger(__name__)

TIMM = "timm/"  # begins the name of weights that timm publishes


@dataclass(frozen=True)
class TrunkFile:
    """A file with a trunk's pretrained weights.

    Attributes:
        path: on this machine.
        name: ``timm/`` and timm's name with its tag, or the name of a file.
        sha256: of the content.
        license: as timm or the Hub names it; None where neither does.
    """

    path: Path
    name: str
    sha256: str
    license: str | None


def published_file(
    name: str,
    *,
    cache_dir: settings.Home = None,
    offline: bool | None = None,
    progress: bool = True,
) -> TrunkFile:
    """The file of timm's weights, from huggingface_hub's cache or downloaded into it.

    Args:
        name: of timm, with or without ``timm/`` and a tag.
        cache_dir: as for ``load``.
        offline: as for ``load``.
        progress: as for ``load``.

    Raises:
        ConfigError: timm has no weights of that name.
        DownloadError: they cannot be fetched, or are in no cache in offline mode; the message says
            where they were looked for.
    """
    known = pretraining(name)
    if known is None or not (known.hf_hub_id or known.url):
        raise ConfigError(
            f"timm has no weights for {shown(name)}: give a file (checkpoint=, --checkpoint), or "
            "train from scratch (start='scratch', --from scratch)"
        )
    without_network, home = settings.is_offline(offline), settings.home(cache_dir)
    try:
        if known.hf_hub_id:
            source = HubFile(known.hf_hub_id, None, known.hf_hub_filename)
            with bars(progress) as lines:
                chosen = hub.choose(source, offline=without_network)
                path = hub.fetch(chosen, home, lines(str(chosen)), offline=without_network)
        else:
            path = fetched(known.url, home, without_network, progress)
    except (DownloadError, CheckpointError) as error:  # the latter: no file in the repository
        where = f"{known.hf_hub_id} in {huggingface_hub.constants.HF_HUB_CACHE}"
        raise DownloadError(
            f"the weights of the trunk {shown(name)} were looked for as "
            f"{where if known.hf_hub_id else known.url}: {error}. Or train from scratch "
            "(start='scratch', --from scratch)"
        ) from error
    tagged = f"{known.architecture}.{known.tag}" if known.tag else str(known.architecture)
    licence = known.license or _license_on_the_hub(known.hf_hub_id, without_network)
    return TrunkFile(path, f"{TIMM}{tagged}", atomic.sha256(path), licence)


def own_file(
    file: str | os.PathLike[str],
    *,
    cache_dir: settings.Home = None,
    offline: bool | None = None,
    progress: bool = True,
) -> TrunkFile:
    """A file that the user gives; nothing is known of its licence.

    Raises:
        CheckpointError: there is no such file.
        ConfigError: neither a file nor a URL.
        DownloadError: it cannot be fetched.
    """
    home, without_network = settings.home(cache_dir), settings.is_offline(offline)
    path = fetched(os.fspath(file), home, without_network, progress)
    return TrunkFile(path, path.name, atomic.sha256(path), None)


def referenced_tensors(
    backbone: AroundTimm,
    network: TimmDetector,
    place: str,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    cache_dir: settings.Home = None,
    offline: bool | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """The trunk's weights of a detector that refers to them by name and hash.

    Args:
        backbone: of that network; the weights are read into its trunk.
        network: the detector's settings.
        place: the detector's folder or repository, for errors.
        checkpoint: the file, where it is on this machine; by default timm's of that name.
        cache_dir: as for ``load``.
        offline: as for ``load``.
        progress: as for ``load``.

    Returns:
        The tensors under their names in the detector.

    Raises:
        CheckpointError: the file is another one, or the name is a file's and no file is given.
        DownloadError: it cannot be fetched, or is in no cache in offline mode.
    """
    named = str(network.weights)
    common: dict[str, Any] = {"cache_dir": cache_dir, "offline": offline, "progress": progress}
    if checkpoint is not None:
        file = own_file(checkpoint, **common)
    elif named.startswith(TIMM):
        file = published_file(named, **common)
    else:
        raise CheckpointError(
            f"{place} refers to its trunk's weights, the file {shown(named)} with sha256 "
            f"{network.sha256}: give that file, load({place!r}, checkpoint=FILE) or --checkpoint "
            "FILE"
        )
    if file.sha256 != network.sha256:
        raise CheckpointError(
            f"{place} refers to the trunk's weights {shown(named)} with sha256 {network.sha256}, "
            f"and {shown(file.path, PATH)} has {file.sha256}: give the file that the detector was "
            "trained with (checkpoint=, --checkpoint)"
        )
    read_trunk(backbone, network.trunk, file, **common)
    return {TRUNK + name: value for name, value in backbone.backbone.state_dict().items()}


def referenced_trunk(
    row: Row, place: str, checkpoint: str | os.PathLike[str] | None = None, **common: Any
) -> tuple[dict[str, Tensor], str | None]:
    """The weights that a detector's row refers to; nothing where it refers to none.

    Args:
        row: of any detector.
        place: as for `referenced_tensors`.
        checkpoint: as for `referenced_tensors`.
        common: ``cache_dir``, ``offline`` and ``progress`` as for `referenced_tensors`.

    Returns:
        The tensors under their names in the detector, and their `digest`.

    Raises:
        ZooError: as `referenced_tensors`.
    """
    if row.network is None or row.network.stored:
        return {}, None
    backbone = build_around(row.network)
    tensors = referenced_tensors(backbone, row.network, place, checkpoint=checkpoint, **common)
    return tensors, backbone.read_digest


def read_trunk(
    backbone: AroundTimm,
    name: str,
    file: TrunkFile,
    *,
    cache_dir: settings.Home = None,
    offline: bool | None = None,
    progress: bool = True,
) -> None:
    """Read a file into the backbone, and note what the trunk's weights were.

    Raises:
        CheckpointError: the file is damaged or unsafe, or its weights are not this network's.
    """
    read_backbone(
        backbone, name, file.path, cache_dir=cache_dir, offline=offline, progress=progress
    )
    backbone.read_digest = digest(backbone.backbone)


def _license_on_the_hub(repository: str | None, offline: bool) -> str | None:
    """The licence that the repository's card names; None where that cannot be found out."""
    if not repository or hub.is_offline(offline):
        return None
    try:
        card = huggingface_hub.HfApi().model_info(repository, timeout=hub.CONNECT).card_data
    # huggingface_hub raises exceptions of its HTTP library in addition to its own.
    except Exception as error:
        logger.warning("the licence of %s is unknown: %s", repository, shown(error, 200))
        return None
    found = card.get("license_name") or card.get("license") if card is not None else None
    return found if isinstance(found, str) else None
