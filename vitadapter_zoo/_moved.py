"""Modules that have moved: their old names work for one release, with a DeprecationWarning.

Remove this module, and its uses in the package root, in the release after 0.1.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Every module whose old name was documented; names inside of the package.
MOVED = {
    "dataset": "evaluation.dataset",
    "report": "reports.report",
}
PACKAGE = __name__.rpartition(".")[0]


def moved(name: str, *, stacklevel: int = 2) -> ModuleType:
    """The module that was ``vitadapter_zoo.<name>``, with a warning that names the new one.

    Args:
        name: a key of ``MOVED``.
        stacklevel: of the warning, as ``warnings.warn`` counts from the caller of this function.
    """
    old, new = f"{PACKAGE}.{name}", f"{PACKAGE}.{MOVED[name]}"
    warnings.warn(
        f"{old} has moved: import {new} instead; the old name is removed in the next release",
        DeprecationWarning,
        stacklevel=stacklevel + 1,
    )
    return importlib.import_module(new)


class _Finder(MetaPathFinder, Loader):
    """Makes ``import vitadapter_zoo.<old name>`` find the module under its new name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package != PACKAGE or name not in MOVED:
            return None
        moved(name)  # here, because Python's own import frames are left out of the count
        return ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__.rpartition(".")[2]
        sys.modules[module.__name__] = sys.modules[f"{PACKAGE}.{MOVED[name]}"]


def install() -> None:
    """Let the old names be imported; a second call changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
