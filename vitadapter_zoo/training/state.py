"""Files of a run: the state for resuming, the saved detectors and the log."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.models import MaskRCNN
from vitadapter_zoo.models.trunk import TRUNK, AroundTimm
from vitadapter_zoo.publishing.pretrained import save_pretrained
from vitadapter_zoo.text import JSONError, parse_json, shown
from vitadapter_zoo.weights import atomic

STATE = "state.pt"
LOG = "log.jsonl"
VALIDATION = "valid.json"
LAST, BEST = "last", "best"


class Average:
    """The exponential moving average (EMA) of a detector's weights, on the detector's device.

    The decay starts small, so that the first weights have little influence: at step t it is
    ``min(decay, (1 + t) / (10 + t))``.

    Args:
        model: the detector whose weights are averaged.
        average: a copy of it, which holds the average.
        decay: in 0..1.
    """

    def __init__(self, model: nn.Module, average: MaskRCNN, decay: float) -> None:
        self.average = average.eval().requires_grad_(False)
        self._decay = decay
        pairs = [
            (mean, value)
            for mean, value in zip(
                average.state_dict().values(), model.state_dict().values(), strict=True
            )
            if mean.data_ptr() != value.data_ptr()  # a frozen trunk is shared
        ]
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._others = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after optimizer step ``step``, counted from 1."""
        weight = 1 - min(self._decay, (1 + step) / (10 + step))
        averages, values = zip(*self._floats, strict=True)
        torch._foreach_lerp_(list(averages), list(values), weight)
        for average, value in self._others:
            average.copy_(value)


def frozen_trunk(model: nn.Module) -> nn.Module | None:
    """The trunk of a detector around a timm model that training does not change; else None."""
    backbone = getattr(model, "backbone", None)
    return backbone.backbone if isinstance(backbone, AroundTimm) and backbone.frozen else None


def weights_of(model: nn.Module, *, without_trunk: bool) -> dict[str, Tensor]:
    """A detector's state dict, with or without the trunk of a timm model."""
    return {
        name: value
        for name, value in model.state_dict().items()
        if not (without_trunk and name.startswith(TRUNK))
    }


def completed(model: nn.Module, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Saved weights, and those of a frozen trunk that the state leaves out and the model has."""
    trunk = frozen_trunk(model)
    present = {} if trunk is None else {TRUNK + name: x for name, x in trunk.state_dict().items()}
    return present | dict(saved)


def write_state(directory: Path, content: Mapping[str, Any]) -> None:
    """Replace the run's state in one step: a crash leaves the old one or the new one.

    Raises:
        ZooError: it cannot be written.
    """
    with atomic.replacing(directory / STATE) as partial:
        torch.save(dict(content), partial)


def read_state(directory: Path) -> dict[str, Any] | None:
    """The state of a run on the CPU; None where there is none yet.

    Raises:
        ZooError: the file is damaged.
    """
    path = directory / STATE
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return dict(state)
    # A damaged pickle makes torch raise almost any exception.
    except Exception as error:
        reason = shown(str(error).partition("\n")[0] or type(error).__name__)
        raise ZooError(
            f"{path} cannot be read ({reason}): restore it, or begin again in another folder"
        ) from error


def write_folder(model: MaskRCNN, target: Path, *, reference_backbone: bool = False) -> None:
    """Write a detector with ``save_pretrained`` in one step.

    Between the two renames of a crash the old folder lies beside its place; ``recover`` moves it
    back.

    Raises:
        ZooError: it cannot be written.
    """
    fresh, old = _beside(target)
    with atomic.writing_to(target.parent):
        for left in (fresh, old):
            if left.exists():
                shutil.rmtree(left)
    save_pretrained(model, fresh, reference_backbone=reference_backbone)
    with atomic.writing_to(target.parent):
        if target.exists():
            target.replace(old)
        fresh.replace(target)
        if old.exists():
            shutil.rmtree(old)


def recover(directory: Path) -> None:
    """Remove or restore the partial folders of a killed process.

    Raises:
        ZooError: the directory cannot be written to.
    """
    with atomic.writing_to(directory):
        for name in (LAST, BEST):
            fresh, old = _beside(directory / name)
            if old.exists() and not (directory / name).exists():
                old.replace(directory / name)
            for left in (fresh, old):
                if left.exists():
                    shutil.rmtree(left)


def _beside(target: Path) -> tuple[Path, Path]:
    return target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")


def append_log(directory: Path, entry: Mapping[str, Any]) -> None:
    """Add one line to the log.

    Raises:
        ZooError: it cannot be written.
    """
    with atomic.writing_to(directory), (directory / LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def read_log(directory: Path) -> list[dict[str, Any]]:
    """Read the log up to the first incomplete or foreign line."""
    path = directory / LOG
    lines: Iterable[bytes] = path.read_bytes().splitlines() if path.exists() else ()
    entries = []
    for line in lines:
        try:
            entry = parse_json(line)
        except JSONError:
            break
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            break
        entries.append(entry)
    return entries


def truncate_log(directory: Path, step: int) -> None:
    """Remove the entries of steps after ``step``, which will be repeated.

    Raises:
        ZooError: it cannot be written.
    """
    if (directory / LOG).exists():
        kept = [entry for entry in read_log(directory) if entry["step"] <= step]
        atomic.write_text(directory / LOG, "".join(json.dumps(entry) + "\n" for entry in kept))


def is_finite(model: nn.Module) -> bool:
    """Return whether every weight is finite; waits for the device."""
    sums = [value.sum() for value in model.state_dict().values() if value.is_floating_point()]
    return bool(torch.stack([x.float() for x in sums]).isfinite().all()) if sums else True


def to_cpu(state: Any) -> Any:
    """A state with its tensors on the CPU, copied."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: to_cpu(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(to_cpu(value) for value in state)
    return state
