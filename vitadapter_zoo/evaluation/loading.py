"""The detector to evaluate: loaded by name, or a detector that the caller has loaded."""

from __future__ import annotations

import os

from vitadapter_zoo.evaluation.options import Options
from vitadapter_zoo.loader import load
from vitadapter_zoo.models import MaskRCNN


def load_detector(
    model: str | os.PathLike[str] | MaskRCNN, options: Options
) -> tuple[MaskRCNN, str]:
    """Return the detector and its name.

    Raises:
        ZooError: what ``load`` raises.
        ValueError: as ``check_loaded``.
    """
    if isinstance(model, MaskRCNN):
        check_loaded(model, options)
        return model, model.row.name
    detector = load(
        model,
        checkpoint=options.checkpoint,
        device=options.device or "cpu",
        dtype=options.dtype,
        cache_dir=options.cache_dir,
        offline=options.offline,
        progress=options.progress,
        allow_nonfinite=options.allow_nonfinite,
    )
    detector.allow_tf32 = options.allow_tf32
    return detector, os.fspath(model)


def check_loaded(model: MaskRCNN, options: Options) -> None:
    """Refuse to change a detector that belongs to the caller.

    Raises:
        ValueError: options that would change it, or it is in training mode.
    """
    if (options.checkpoint, options.device, options.dtype) != (None, None, None):
        raise ValueError(
            "a loaded detector has its weights, device and dtype: leave checkpoint, device and "
            "dtype out"
        )
    if options.allow_tf32:
        raise ValueError(
            "a loaded detector says itself whether it uses TF32: set model.allow_tf32 = True and "
            "leave allow_tf32 out"
        )
    if model.training:
        raise ValueError("the detector is in training mode: call model.eval() first")
