"""Compile the operators of ``csrc/`` if torch and a compiler are installed.

All other settings are in pyproject.toml. With ``VITADAPTER_ZOO_BUILD_OP=1`` the build fails if the
operators cannot be compiled. With ``VITADAPTER_ZOO_BUILD_OP=0`` they are not compiled. By default
they are skipped if they cannot be compiled; the package then uses slower PyTorch operators.
"""

import os
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import find_packages, setup

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
# Importing `ops/__init__.py` would need torch, which may be missing here.
ops = ModuleType("vitadapter_zoo.ops")
ops.__path__ = [str(HERE / "vitadapter_zoo" / "ops")]
sys.modules[ops.__name__] = ops
from vitadapter_zoo.ops import build  # noqa: E402


def find_torch() -> bool:
    """Return whether torch can be imported here or from the environment to install into.

    pip builds in an isolated environment without torch. The operator will run with the torch of the
    outer environment, whose folder the interpreter still reports.
    """
    for name in ("purelib", "platlib"):
        folder = sysconfig.get_path(name)
        if folder not in sys.path:
            sys.path.append(folder)
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError:
        return False
    return True


def options() -> dict[str, Any]:
    """Return the arguments of setup() that are not in pyproject.toml."""
    choice = os.environ.get("VITADAPTER_ZOO_BUILD_OP", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"VITADAPTER_ZOO_BUILD_OP is {choice!r}; it may be 0 or 1")
    if choice == "0":
        return {}
    if not find_torch():
        if choice == "1":
            sys.exit("VITADAPTER_ZOO_BUILD_OP=1, but torch is not installed; install it first")
        print("vitadapter-zoo: torch is not installed: operators are not compiled", file=sys.stderr)
        return {}
    from torch.utils.cpp_extension import BuildExtension

    class BuildOperator(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if choice == "1":
                    raise
                self.extensions = []
                print(f"vitadapter-zoo: the operator is not compiled: {error}", file=sys.stderr)

    extensions = build.extensions(Path("csrc"))
    for extension in extensions:
        # The extensions are independent: if CUDA's does not compile, the CPU's is still installed.
        extension.optional = choice != "1"
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": BuildOperator},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    # `vitadapter-zoo build-op` needs the sources, so the package contains them.
    packages=[*find_packages(include=["vitadapter_zoo*"]), "vitadapter_zoo.csrc"],
    package_dir={"vitadapter_zoo.csrc": "csrc"},
    package_data={
        "vitadapter_zoo": ["py.typed", "data/*/*", "data/*/*/*"],
        "vitadapter_zoo.reports": ["templates/*"],
        "vitadapter_zoo.csrc": ["*"],
    },
    **options(),
)
