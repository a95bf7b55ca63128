"""Starting the workers of an evaluation from its options."""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from vitadapter_zoo.catalog import list_models
from vitadapter_zoo.evaluation.dataset import Dataset
from vitadapter_zoo.evaluation.loading import check_loaded, load_detector
from vitadapter_zoo.evaluation.options import Options
from vitadapter_zoo.evaluation.workers.pool import Pool, Spec
from vitadapter_zoo.models import MaskRCNN


def worker_pool(
    model: str | os.PathLike[str] | MaskRCNN,
    data: Dataset,
    options: Options,
    most: int,
    stack: contextlib.ExitStack,
) -> tuple[Pool, str]:
    """Start a pool of at most ``most`` workers, ended by the stack; return it and the model's name.

    Raises:
        ZooError: what ``load`` raises, or no worker can be started.
        ValueError: as ``check_loaded``, or a loaded detector with ``options.ray``.
    """
    if isinstance(model, MaskRCNN):
        check_loaded(model, options)
        if options.ray is not None:
            raise ValueError(
                "a loaded detector stays on this machine: write it with save_pretrained to a "
                "folder that every node sees, or push_to_hub, and give verify that place"
            )
        from vitadapter_zoo.publishing.pretrained import save_pretrained

        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vitadapter-zoo-"))
        path, name = os.fspath(save_pretrained(model, folder)), model.row.name
        device = str(next(model.parameters()).device)
    else:
        name = os.fspath(model)
        path = name if name in list_models() else _absolute(name)
        device = str(options.device or "cpu")
    checkpoint, home = options.checkpoint, options.cache_dir
    options = replace(
        options,
        checkpoint=None if checkpoint is None else _absolute(os.fspath(checkpoint)),
        device=device,
        allow_tf32=model.allow_tf32 if isinstance(model, MaskRCNN) else options.allow_tf32,
        cache_dir=None if home is None else Path(home).absolute(),
    )
    spec = Spec(path, replace(data, images=(), objects=()), options)
    if options.ray is not None:
        from vitadapter_zoo.evaluation.workers.ray_cluster import actors

        return stack.enter_context(actors(spec, options.ray, options.workers, most)), name
    from vitadapter_zoo.evaluation.workers.processes import processes

    if not isinstance(model, MaskRCNN):
        # Load it here first, so that it is downloaded once and with a progress bar.
        load_detector(path, replace(options, device="cpu", dtype=None))
    return stack.enter_context(processes(spec, min(options.workers or 1, max(1, most)))), name


def _absolute(name: str) -> str:
    """Make a path absolute, so that workers in other directories find it."""
    path = Path(name).expanduser()
    return os.fspath(path.absolute()) if path.exists() else name
