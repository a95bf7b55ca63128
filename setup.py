"""Compiles the operators of ``csrc/`` where torch and a compiler are there.

Everything else stands in pyproject.toml. ``VITADAPTER_ZOO_BUILD_OP=1`` makes a build without the
operator fail, ``=0`` leaves it out; by default it is left out where it cannot be compiled, and the
package then computes in PyTorch, more slowly.
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
# The package's own `ops/__init__.py` registers the operators with torch, which may be missing here.
ops = ModuleType("vitadapter_zoo.ops")
ops.__path__ = [str(HERE / "vitadapter_zoo" / "ops")]
sys.modules[ops.__name__] = ops
from vitadapter_zoo.ops import build  # noqa: E402


def find_torch() -> bool:
    """Whether torch can be imported, if need be from the environment that is installed into.

    pip builds in an isolated environment; the torch that the operator will run with is the one
    outside, whose folder the interpreter still names.
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
    """What setup() gets besides pyproject.toml."""
    wish = os.environ.get("VITADAPTER_ZOO_BUILD_OP", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"VITADAPTER_ZOO_BUILD_OP is {wish!r}; it may be 0 or 1")
    if wish == "0":
        return {}
    if not find_torch():
        if wish == "1":
            sys.exit("VITADAPTER_ZOO_BUILD_OP=1, but torch is not installed")
        print("vitadapter-zoo: no torch here, the operator is not compiled", file=sys.stderr)
        return {}
    from torch.utils.cpp_extension import BuildExtension

    class BuildOperator(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if wish == "1":
                    raise
                self.extensions = []
                print(f"vitadapter-zoo: the operator is not compiled: {error}", file=sys.stderr)

    extensions = build.extensions(Path("csrc"))
    for extension in extensions:
        # Each of its own: where the CUDA part does not compile, the CPU's is still installed.
        extension.optional = wish != "1"
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": BuildOperator},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    # The sources go along, for `vitadapter-zoo build-op`.
    packages=[*find_packages(include=["vitadapter_zoo*"]), "vitadapter_zoo.csrc"],
    package_dir={"vitadapter_zoo.csrc": "csrc"},
    package_data={
        "vitadapter_zoo": ["py.typed", "data/*/*", "data/*/*/*"],
        "vitadapter_zoo.reports": ["templates/*"],
        "vitadapter_zoo.csrc": ["*"],
    },
    **options(),
)
