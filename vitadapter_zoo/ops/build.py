"""Compiling the operators, when the package is built or afterwards.

``setup.py`` and ``vitadapter-zoo build-op`` share this module; torch and setuptools are imported
only in its functions, so that a package can be built where they are missing.
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
)
CUDA_SOURCES = ("cuda.cu",)

# The oldest torch whose stable ABI has all that is used; any newer one can load the result.
TARGET_TORCH = "0x020a000000000000"
# sm_80 is A100, sm_90 is H100; the last is code that newer drivers translate for newer devices.
CUDA_ARCHITECTURES = "8.0;9.0+PTX"


def extensions(folder: Path) -> list[Extension]:
    """What to compile from the sources in ``folder``: for CUDA too where `cuda_wanted`.

    Raises:
        ZooError: ``VITADAPTER_ZOO_CUDA=1``, and there is no CUDA compiler.
    """
    # BuildExtension of torch 2.10 and 2.11 would add -std=c++17.
    flags = ["-O3", "-std=c++20", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TARGET_TORCH}"]
    found = [_extension(CPU_LIBRARY, folder, CPU_SOURCES, {"cxx": flags}, ["torch_cpu"], [])]
    if cuda_wanted():
        flags = [flag.replace("-fvis", "-Xcompiler=-fvis") for flag in flags] + ["-DUSE_CUDA"]
        toolkit = _cuda_toolkit()
        if toolkit is None:
            raise ZooError("VITADAPTER_ZOO_CUDA=1, but no nvcc is on the PATH or in CUDA_HOME")
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
    """An extension that links only what it uses: torch's own helpers would add more libraries."""
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
    """Whether to compile for CUDA: as ``VITADAPTER_ZOO_CUDA`` says, 0 or 1.

    Without it: where there is an nvcc of the CUDA version that torch was built for, whether or not
    this machine has a device.

    Raises:
        ZooError: the variable is neither 0 nor 1.
    """
    import torch

    wish = settings.build_for_cuda()
    if wish is not None:
        return wish
    if torch.version.cuda is None or _cuda_toolkit() is None:
        return False
    release = re.search(r"release (\d+)\.", _nvcc("--version"))
    return release is not None and release[1] == torch.version.cuda.split(".")[0]


def cuda_architectures() -> str:
    """What to compile for: the devices that are here, or `CUDA_ARCHITECTURES` where none is.

    The newest of them also as code that a newer device's driver can translate.
    """
    import torch

    if not torch.cuda.is_available():
        return CUDA_ARCHITECTURES
    devices = range(torch.cuda.device_count())
    found = sorted({torch.cuda.get_device_capability(device) for device in devices})
    return ";".join(f"{major}.{minor}" for major, minor in found) + "+PTX"


def _cuda_toolkit() -> Path | None:
    """Where nvcc's own libraries lie; nvcc may be a script somewhere else, so it is asked."""
    top = re.search(r"TOP=(.+)", _nvcc("-dryrun", "-x", "cu", os.devnull, "-o", os.devnull))
    return Path(top[1].strip()) if top else None


def _nvcc(*arguments: str) -> str:
    """What nvcc says, nothing where there is none."""
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        return ""
    command = [str(Path(CUDA_HOME) / "bin" / "nvcc"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return done.stdout + done.stderr


def build() -> list[Path]:
    """Compile against the installed torch into the cache; what was there before is replaced.

    Returns:
        The libraries: for the CPU, and for CUDA where `cuda_wanted`.

    Raises:
        ZooError: the compiler failed or is missing; the message ends with what it said.
    """
    import torch

    target = built_folder(torch.version.cuda)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as temporary:
        command = [sys.executable, "-m", "vitadapter_zoo.ops.build", temporary]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode != 0:
            log = target.parent / "build-op.log"
            said = done.stdout + done.stderr
            log.write_text(said)
            lines = [line.strip() for line in said.splitlines() if line.strip()]
            errors = [line for line in lines if re.search("[Ee]rror: ", line)] or lines[-1:]
            raise ZooError(
                "the operator could not be compiled; it takes a C++20 compiler, g++ 12 or clang 14 "
                f"(CXX=... names one): {errors[0]} (all that it said is in {log})"
            )
        target.mkdir(exist_ok=True)
        libraries = sorted((Path(temporary) / "vitadapter_zoo").glob("*.so"))
        return [library.replace(target / library.name) for library in libraries]


def compile_into(folder: Path) -> None:
    """Compile the operator against the installed torch, into ``folder / "vitadapter_zoo"``.

    For a process of its own: it changes the working directory, whose pyproject.toml setuptools
    would read, and what the compiler says goes to stdout and stderr.
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
