"""Training a detector around a timm model: what is asked for, and its initial weights."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch

from vitadapter_zoo import settings, timm_detector
from vitadapter_zoo.catalog import list_models, timm_row
from vitadapter_zoo.errors import ConfigError, ZooError
from vitadapter_zoo.loader import load
from vitadapter_zoo.models import MaskRCNN, build
from vitadapter_zoo.models.around import (
    check_adapter,
    check_name,
    pretraining_pixels,
    set_periods,
    timm_name,
)
from vitadapter_zoo.models.trunk import TRUNK, AroundTimm
from vitadapter_zoo.text import shown
from vitadapter_zoo.timm_detector import DINOV3, DINOV3_DROP_PATH, PAPER, TimmDetector
from vitadapter_zoo.training.start import (
    PRETRAINING,
    PUBLISHED,
    SCRATCH,
    carry_over,
    initialize,
)
from vitadapter_zoo.weights.timm_files import (
    TrunkFile,
    own_file,
    published_file,
    read_trunk,
    referenced_tensors,
)


@dataclass(frozen=True)
class Asked:
    """A detector around a timm model, as the caller of ``train`` describes it.

    Attributes:
        network: without the origin of its weights, which is not known yet.
        checkpoint: file or URL of the trunk's weights, or None for timm's.
        start: as for ``train``.
    """

    network: TimmDetector
    checkpoint: str | None
    start: str

    def record(self) -> dict[str, Any]:
        """What the weights of a run depend on, as plain data."""
        return {**self.network.record(), "checkpoint": self.checkpoint}


def asked_for(
    name: str | os.PathLike[str] | None,
    backbone: str | TimmDetector | None,
    *,
    adapter: str | None,
    checkpoint: str | os.PathLike[str] | None,
    freeze: bool | None,
    start: str | os.PathLike[str],
) -> Asked | None:
    """Read the arguments that describe the network; None where ``name`` does.

    Raises:
        ConfigError: neither or both of ``name`` and ``backbone``, or arguments that exclude each
            other.
        UnknownModelError: timm has no such trunk.
    """
    if (name is None) == (backbone is None):
        raise ConfigError(
            "give the name of a detector, or the backbone of a new one (--backbone), not both"
        )
    if backbone is None:
        given = {"adapter": adapter, "checkpoint": checkpoint, "freeze_backbone": freeze}
        wrong = [key for key, value in given.items() if value is not None]
        if wrong:
            raise ConfigError(
                f"{wrong[0]} belongs to a backbone of timm (--backbone). Weights of {name} are "
                "given as the start (--from), and `--freeze backbone` freezes parameters"
            )
        return None
    network = _network(backbone, adapter, freeze)
    if checkpoint is not None and os.fspath(start) not in (PUBLISHED, PRETRAINING):
        raise ConfigError(
            "checkpoint is the file of the trunk's weights; with another start (--from) leave it "
            "out"
        )
    file = None if checkpoint is None else os.fspath(checkpoint)
    return Asked(network, file, os.fspath(start))


def _network(
    backbone: str | TimmDetector, adapter: str | None, freeze: bool | None
) -> TimmDetector:
    if isinstance(backbone, TimmDetector):
        if adapter is not None or freeze is not None:
            raise ConfigError(
                "a TimmDetector says itself which adapter it has and whether its trunk is frozen: "
                "leave adapter and freeze_backbone out"
            )
        network = replace(
            backbone, trunk=timm_name(backbone.trunk), weights=None, sha256=None, license=None,
            stored=True, periods=None,
        )  # fmt: skip
    else:
        adapter = PAPER if adapter is None else adapter
        check_adapter(adapter)
        is_dinov3 = adapter == DINOV3
        network = TimmDetector(
            trunk=timm_name(backbone), adapter=adapter,
            frozen=is_dinov3 if freeze is None else freeze,
            drop_path=DINOV3_DROP_PATH if is_dinov3 else 0.0,
        )  # fmt: skip
    timm_detector.check(network)
    check_name(network.trunk)
    return network


def starting_around(
    asked: Asked,
    classes: tuple[str, ...],
    *,
    input_size: tuple[int, int] | None = None,
    seed: int = 0,
    resumes: bool = False,
    cache_dir: settings.Home = None,
    offline: bool | None = None,
    progress: bool = True,
) -> tuple[MaskRCNN, str]:
    """Build the detector that training starts with; describe the origin of its weights in a line.

    Args:
        asked: the network and the start.
        classes: names of the classes to learn.
        input_size: (longest, shortest) side in pixels; 1333 and 800 by default.
        seed: of the fresh weights.
        resumes: a saved state follows, so that no weights are read.
        cache_dir: as for ``load``.
        offline: as for ``load``.
        progress: as for ``load``.

    Raises:
        ZooError: the weights cannot be found or read, or are not this network's.
    """
    common: dict[str, Any] = {"cache_dir": cache_dir, "offline": offline, "progress": progress}
    network, start = asked.network, SCRATCH if resumes else asked.start
    mean, std = pretraining_pixels(network.trunk)
    file = _trunk_file(asked, common) if start in (PUBLISHED, PRETRAINING) else None
    row = timm_row(network, mean, std)
    if input_size is not None:
        row = replace(row, input_size=input_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(row, classes)
    initialize(model, seed)
    backbone = model.backbone
    assert isinstance(backbone, AroundTimm)  # noqa: S101  for the type checker
    if file is not None:
        read_trunk(backbone, network.trunk, file, **common)
        found = replace(
            network, weights=file.name, sha256=file.sha256, license=file.license,
            periods=_own_periods(backbone),
        )  # fmt: skip
        model.row = timm_row(found, mean, std, row.input_size)
        return model, f"trunk of {shown(file.name)}, adapter and heads random"
    if start == SCRATCH:
        return model, "random initial weights"
    return model, _from_detector(model, start, common)


def _from_detector(model: MaskRCNN, start: str, common: dict[str, Any]) -> str:
    """Copy the weights of a trained detector around the same trunk."""
    if start not in list_models() and settings.expanded(start).is_file():
        raise ConfigError(
            f"{shown(start)} is a file: give weights of the trunk as the checkpoint "
            "(--checkpoint), or the folder of a trained detector as the start (--from)"
        )
    source = load(start, **common)
    origin = carry_over(source, model, shown(start))
    theirs, network = source.row.network, model.row.network
    if theirs is not None and network is not None:
        found = replace(
            network, weights=theirs.weights, sha256=theirs.sha256, license=theirs.license,
            periods=theirs.periods,
        )  # fmt: skip
        _take(model, found)
    return origin


def resume_network(
    model: MaskRCNN,
    saved: dict[str, Any],
    checkpoint: str | os.PathLike[str] | None,
    **common: Any,
) -> None:
    """Give a detector around a timm model what a run's saved state knows beside its weights.

    These are the origin of the trunk's weights, its rotary periods and, where the state refers to
    the trunk, its weights.

    Raises:
        ZooError: the trunk's weights are not those that the state refers to.
    """
    if model.row.network is None or not isinstance(model.backbone, AroundTimm):
        return
    network = timm_detector.read(saved["network"], "the saved state", ZooError)
    if not any(name.startswith(TRUNK) for name in saved["model"]):
        referenced_tensors(
            model.backbone, network, "the saved state", checkpoint=checkpoint, **common
        )
    _take(model, network)


def check_reference(model: MaskRCNN, start: str) -> None:
    """Refuse to refer to a trunk that is not a file's, before anything is trained.

    Raises:
        ConfigError: with the reason.
    """
    network = model.row.network
    if network is None:
        raise ConfigError(
            f"reference_backbone is for detectors around a timm model, not for {model.row.name}"
        )
    if not network.frozen:
        raise ConfigError(
            "reference_backbone refers to weights that training does not change: freeze the trunk "
            "(--freeze-backbone) or leave it out"
        )
    if not isinstance(model.backbone, AroundTimm) or model.backbone.read_digest is None:
        raise ConfigError(
            f"reference_backbone: with the start {shown(start)!r} the trunk's weights are not read "
            "from a file of pretrained weights, so that nothing can be referred to"
        )


def _take(model: MaskRCNN, network: TimmDetector) -> None:
    model.row = replace(
        timm_row(network, model.row.mean, model.row.std), input_size=model.row.input_size
    )
    assert isinstance(model.backbone, AroundTimm)  # noqa: S101  for the type checker
    set_periods(model.backbone, network)


def _trunk_file(asked: Asked, common: dict[str, Any]) -> TrunkFile:
    """The pretrained weights' file.

    Raises:
        ConfigError: timm has none for a trunk of other sizes than its own.
        DownloadError: it cannot be fetched; the message says where it was looked for.
    """
    if asked.checkpoint is not None:
        return own_file(asked.checkpoint, **common)
    if asked.network.is_resized:
        raise ConfigError(
            f"timm has no weights for {asked.network.trunk} with another dim, depth or heads: give "
            "a file (checkpoint=), or train from scratch (start='scratch')"
        )
    return published_file(asked.network.trunk, **common)


def _own_periods(backbone: AroundTimm) -> tuple[float, ...] | None:
    """The rotary embedding's periods, where the file had others than timm computes."""
    rope: Any = getattr(backbone.backbone, "rope", None)
    periods = getattr(rope, "periods", None)
    if periods is None or torch.equal(periods, rope._compute_periods()):
        return None
    return tuple(periods.tolist())
