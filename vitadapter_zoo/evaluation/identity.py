"""The identity of a run: everything that its results depend on, and the folder it is stored in."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitadapter_zoo import settings
from vitadapter_zoo.environment import environment
from vitadapter_zoo.evaluation.dataset import Dataset
from vitadapter_zoo.models import MaskRCNN
from vitadapter_zoo.weights import cache


@dataclass(frozen=True)
class Facts:
    """What a run needs to know about a detector, in whichever process it is loaded.

    Attributes:
        identity: everything that the results depend on, ready for JSON.
        published: box and mask AP in points (0..100).
    """

    identity: dict[str, Any]
    published: tuple[float, float]


def facts_of(model: MaskRCNN, data: Dataset, backend: str = "native", batch_size: int = 1) -> Facts:
    """The facts about a loaded detector."""
    identity = run_identity(model, data, backend, batch_size)
    return Facts(identity, (model.row.box_ap, model.row.mask_ap))


def run_identity(
    model: MaskRCNN, data: Dataset, backend: str = "native", batch_size: int = 1
) -> dict[str, Any]:
    """Everything that the results of a run depend on, ready for JSON."""
    weights = next(model.parameters())
    kind = weights.device.type
    found = environment()
    processor = (
        torch.cuda.get_device_name(weights.device)
        if kind == "cuda"
        else found["machine"]["processor"]
    )
    wanted = ("vitadapter-zoo", "torch", "torchvision", "opencv-python-headless")
    identity = {
        "model": model.row.name,
        "backend": backend,
        "weights_sha256": weights_sha256(model),
        **({"network": model.row.network.record()} if model.row.network else {}),
        "input_size": list(model.row.input_size),
        "mean": list(model.row.mean),
        "std": list(model.row.std),
        "classes": list(model.categories),
        "annotations_sha256": data.sha256,
        "precision": precision(model),
        "device": kind,
        "processor": processor,
        "threads": torch.get_num_threads() if kind == "cpu" else None,
        "operator": "compiled" if found["operator"][kind]["compiled"] else "reference",
        "resize": "OpenCV bilinear",
        **({"exif": "ignored"} if data.ignore_exif else {}),
        "versions": {name: found["versions"][name] for name in wanted},
    }
    return with_batch_size(identity, batch_size)


def with_batch_size(identity: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """The identity of the same run with another batch size; a single image is not mentioned."""
    found = {key: value for key, value in identity.items() if key != "batch_size"}
    if batch_size == 1:
        return found
    versions = found.pop("versions")
    return {**found, "batch_size": batch_size, "versions": versions}


def precision(model: MaskRCNN) -> str:
    """The type that a detector computes in: its weights', or ``"tf32"``."""
    weights = next(model.parameters())
    if weights.dtype == torch.float32 and weights.device.type == "cuda" and model.allow_tf32:
        return "tf32"
    return str(weights.dtype).removeprefix("torch.")


def weights_sha256(model: MaskRCNN) -> str:
    """The sha256 over all state-dict names and values; it does not depend on the file format."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def run_directory(name: str, identity: dict[str, Any], cache_dir: settings.Home = None) -> Path:
    """The default folder for a run with this identity."""
    readable = Path(name).name or "model"
    return settings.home(cache_dir) / "runs" / f"{readable}-{cache.digest(repr(identity))}"
