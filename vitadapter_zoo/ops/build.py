"""Compiling the operators, for ``setup.py`` and for ``vitadapter-zoo build-op``.

Only functions import torch and setuptools, so that ``setup.py`` can build the package without
torch.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from vitadapter_zoo import settings
from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.ops.paths import CPU_LIBRARY, CUDA_LIBRARY, built_folder, sources

if TYPE_CHECKING:
    from setuptools import Extension

CPU_SOURCES = (
    "cpu.cpp",
    "cpu_portable.cpp",
    "cpu_avx2.cpp",
    "cpu_avx512.cpp",
    "masks.cpp",
    "roi_align.cpp",
    "conv3x3.cpp",
)
CUDA_SOURCES = ("cuda.cu",)

# The oldest torch whose stable ABI has every function used. Newer releases can load the libraries.
TARGET_TORCH = "0x020a000000000000"
# sm_80 is the A100 and sm_90 the H100. PTX is code that a driver can translate for newer devices.
CUDA_ARCHITECTURES = "8.0;9.0+PTX"


def extensions(folder: Path) -> list[Extension]:
    """Return the extensions to compile from ``folder``: for the CPU and, if wanted, for CUDA.

    Raises:
        ZooError: ``VITADAPTER_ZOO_CUDA=1``, and there is no CUDA compiler.
    """
    # Without a -std flag, BuildExtension of torch 2.10 and 2.11 would add -std=c++17.
    flags = ["-O3", "-std=c++20", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TARGET_TORCH}"]
    found = [_extension(CPU_LIBRARY, folder, CPU_SOURCES, {"cxx": flags}, ["torch_cpu"], [])]
    if cuda_wanted():
        flags = [flag.replace("-fvis", "-Xcompiler=-fvis") for flag in flags] + ["-DUSE_CUDA"]
        toolkit = _cuda_toolkit()
        if toolkit is None:
            raise ZooError(
                "VITADAPTER_ZOO_CUDA=1, but no nvcc was found; put it on the PATH or set CUDA_HOME"
            )
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", cuda_architectures())
        libraries = ["torch_cpu", "torch_cuda", "cudart"]
        folders = [str(toolkit / "lib64"), str(toolkit / "lib")]
        found.append(
            _extension(CUDA_LIBRARY, folder, CUDA_SOURCES, {"nvcc": flags}, libraries, folders)
        )
    return found


def _extension(
    name: str,
    folder: Path,
    files: tuple[str, ...],
    flags: dict[str, list[str]],
    libraries: list[str],
    library_folders: list[str],
) -> Extension:
    """Return an extension that links only the given libraries; torch's helpers would add more."""
    from setuptools import Extension
    from torch.utils import cpp_extension

    return Extension(
        f"vitadapter_zoo.{name}",
        [str(folder / file) for file in files],
        language="c++",
        include_dirs=cpp_extension.include_paths(),
        library_dirs=cpp_extension.library_paths() + library_folders,
        libraries=libraries,
        extra_compile_args=flags,  # type: ignore[arg-type]  # BuildExtension takes a dictionary
        extra_link_args=["-s"] if sys.platform.startswith("linux") else [],
        py_limited_api=True,
    )


def cuda_wanted() -> bool:
    """Return whether to compile for CUDA.

    ``VITADAPTER_ZOO_CUDA`` (0 or 1) decides. Without it the answer is yes if there is an nvcc with
    the major CUDA version that torch was built for. A CUDA device is not needed.

    Raises:
        ZooError: the variable is neither 0 nor 1.
    """
    import torch

    choice = settings.build_for_cuda()
    if choice is not None:
        return choice
    if torch.version.cuda is None or _cuda_toolkit() is None:
        return False
    release = re.search(r"release (\d+)\.", _nvcc("--version"))
    return release is not None and release[1] == torch.version.cuda.split(".")[0]


def cuda_architectures() -> str:
    """Return the compute capabilities to compile for, in the format of ``TORCH_CUDA_ARCH_LIST``.

    They are those of this machine's devices, or `CUDA_ARCHITECTURES` without a device. The newest
    is also compiled to PTX, which a driver can translate for newer devices.
    """
    import torch

    if not torch.cuda.is_available():
        return CUDA_ARCHITECTURES
    devices = range(torch.cuda.device_count())
    found = sorted({torch.cuda.get_device_capability(device) for device in devices})
    return ";".join(f"{major}.{minor}" for major, minor in found) + "+PTX"


def _cuda_toolkit() -> Path | None:
    """Return the toolkit's folder as nvcc reports it; ``nvcc`` may be a script somewhere else."""
    top = re.search(r"TOP=(.+)", _nvcc("-dryrun", "-x", "cu", os.devnull, "-o", os.devnull))
    return Path(top[1].strip()) if top else None


def _nvcc(*arguments: str) -> str:
    """Run nvcc and return its output, or an empty string if there is no nvcc."""
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        return ""
    command = [str(Path(CUDA_HOME) / "bin" / "nvcc"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return done.stdout + done.stderr


def build() -> list[Path]:
    """Compile the operators against the installed torch and replace those in the cache.

    Returns:
        The libraries: one for the CPU and, if `cuda_wanted`, one for CUDA.

    Raises:
        ZooError: the compiler failed or is missing; the message has its first error.
    """
    import torch

    target = built_folder(torch.version.cuda)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as temporary:
        command = [sys.executable, "-m", "vitadapter_zoo.ops.build", temporary]
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, encoding="utf-8", errors="replace", check=False
        )
        if done.returncode != 0:
            log = target.parent / "build-op.log"
            output = done.stdout + done.stderr
            log.write_text(output, encoding="utf-8")
            lines = [line.strip() for line in output.splitlines() if line.strip()]
            errors = [line for line in lines if re.search("[Ee]rror: ", line)] or lines[-1:]
            raise ZooError(
                f"the operator could not be compiled: {errors[0]} (the full output is in {log}). "
                "It needs a C++20 compiler, g++ 12 or clang 14 or newer; CXX=... selects it"
            )
        target.mkdir(exist_ok=True)
        libraries = sorted((Path(temporary) / "vitadapter_zoo").glob("*.so"))
        return [library.replace(target / library.name) for library in libraries]


def compile_into(folder: Path) -> None:
    """Compile the operators against the installed torch into ``folder / "vitadapter_zoo"``.

    Run it in a separate process. It changes the working directory, because setuptools would read
    the pyproject.toml there, and the compiler writes to stdout and stderr.
    """
    folder = folder.resolve()
    os.chdir(folder)
    from setuptools import setup
    from torch.utils.cpp_extension import BuildExtension

    setup(
        name="vitadapter-zoo-op",
        ext_modules=extensions(sources()),
        cmdclass={"build_ext": BuildExtension.with_options(use_ninja=False)},
        script_args=[
            "build_ext", "--build-lib", str(folder), "--build-temp", str(folder / "objects"),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    compile_into(Path(sys.argv[1]))
