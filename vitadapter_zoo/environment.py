"""What `vitadapter-zoo env` shows: versions, the machine, and what computes the operators."""

from __future__ import annotations

import os
import platform
import warnings
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vitadapter_zoo import settings
from vitadapter_zoo._version import __version__
from vitadapter_zoo.ops import masks
from vitadapter_zoo.ops.library import implementation

PACKAGES = (
    "torch", "torchvision", "timm", "safetensors", "numpy", "opencv-python-headless", "hotcoco",
    "mmdet", "mmcv-full",
)  # fmt: skip


def environment() -> dict[str, dict[str, Any]]:
    """Sections ``versions``, ``machine`` and ``operator``, ready for JSON.

    ``operator`` has for ``cpu``, and ``cuda`` where torch sees such a device, whether the compiled
    kernels compute `vitadapter_zoo.ops.ms_deform_attn` and why (or why not), and ``masks`` the same
    for `vitadapter_zoo.ops.paste_rle`. Packages that are not installed are None.
    """
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says why
        operator = {device: asdict(implementation(device)) for device in devices}
        operator["masks"] = asdict(masks.implementation())
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {
            "vitadapter-zoo": __version__,
            "python": platform.python_version(),
            **{package: _version(package) for package in PACKAGES},
        },
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "instruction set of torch": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads of torch": torch.get_num_threads(),
            "CUDA of torch": torch.version.cuda,
            "CUDA devices": names,
            "cache": str(settings.home()),
        },
        "operator": operator,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name; `platform.processor` does not give it on Linux."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
