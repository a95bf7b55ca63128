"""The locations of the operators' sources and compiled libraries.

This module imports neither torch nor another module of ``ops``, because ``setup.py`` uses it.
"""

import hashlib
import platform
from pathlib import Path

from vitadapter_zoo import settings
from vitadapter_zoo._version import __version__
from vitadapter_zoo.errors import ZooError

CPU_LIBRARY = "_C"
CUDA_LIBRARY = "_C_cuda"
PACKAGE = Path(__file__).parents[1]


def sources() -> Path:
    """Return the folder of the C++ and CUDA sources.

    It is beside the package in a clone and inside the package in an installation.

    Raises:
        ZooError: the sources are missing.
    """
    for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if (folder / "cpu.cpp").is_file():
            return folder
    raise ZooError(f"the sources of the operator are missing from {PACKAGE}; install it again")


def built_folder(cuda_version: str | None) -> Path:
    """Return the folder in which ``vitadapter-zoo build-op`` stores this machine's libraries.

    Its name depends on the sources, so a change of the sources leads to another folder.

    Args:
        cuda_version: the CUDA version that torch was built for, ``torch.version.cuda``.
    """
    digest = hashlib.sha256(__version__.encode())
    folder = sources()
    for name in sorted(path.name for path in folder.iterdir() if path.is_file()):
        digest.update((folder / name).read_bytes())
    cuda = (cuda_version or "none").split(".")[0]
    return settings.home() / "op" / f"{platform.machine()}-cuda-{cuda}-{digest.hexdigest()[:12]}"
