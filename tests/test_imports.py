"""The order of the package's imports, its public names, and the names that have moved."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vitadapter_zoo
from vitadapter_zoo._moved import MOVED

PACKAGE = Path(vitadapter_zoo.__file__).parent
ROOT = PACKAGE.name
# Folders and modules of the package from the top; one imports only from the layers below its own.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("web",),
    ("reports",),
    ("training", "exporting"),  # training measures a model's AP as it goes, and reads the same data
    ("evaluation",),
    ("backbones",),
    ("loader",),
    ("finder",),
    ("backends", "publishing"),
    ("weights",),
    ("models", "environment"),
    ("detections",),
    ("ops",),
    ("images", "catalog"),
    ("settings", "class_names", "timm_detector"),
    ("text",),
    ("errors", "_version", "_moved"),
)
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}


def modules() -> dict[str, Path]:
    """Return the package's modules by name; a folder is its ``__init__``."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = [ROOT, *path.relative_to(PACKAGE).with_suffix("").parts]
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


class Running(ast.NodeTransformer):
    """Removes code that only type checkers read."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        is_typing = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        return None if is_typing else self.generic_visit(node)


def imported(path: Path, known: dict[str, Path], *, typing: bool) -> set[str]:
    """Return the package's modules that a file imports, at its top or inside a function."""
    names = set()
    tree: ast.AST = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree if typing else Running().visit(tree)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in known else str(node.module) for name in inner}
    return {name for name in names if name.split(".")[0] == ROOT}


def test_imports_run_one_way() -> None:
    known = modules()
    del known[ROOT]  # it gathers the public names of all layers
    wrong = []
    for name, path in known.items():
        unit = name.split(".")[1]
        for other in imported(path, known, typing=True):
            lower = other.split(".")[1] if other != ROOT else ROOT
            if lower != unit and (lower == ROOT or LEVEL[lower] <= LEVEL[unit]):
                wrong.append(f"{name} imports {other}")
    assert wrong == []
    graph = {name: imported(path, known, typing=False) for name, path in known.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises where there is a cycle


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def printed_names() -> list[str]:
    """Return the package's names that the README and the site print."""
    pages = [PACKAGE.parent / "README.md", *(PACKAGE.parent / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    found = re.findall(r"(?<![\w/])vitadapter_zoo((?:\.[A-Za-z_]\w*)+)", text)
    return sorted({f"zoo{name}" for name in found})


def test_every_public_name_is_there_after_a_bare_import() -> None:
    """The names in ``__all__``, and those that the README and the site print."""
    names = printed_names()
    assert {"zoo.load", "zoo.evaluation.read_dataset", "zoo.reports.write"} <= set(names)
    # Two need more: mmdet, and what the site imports in the line above.
    rest = [name for name in names if not name.startswith(("zoo.backends.mmdet", "zoo.ops.compat"))]
    lines = [
        "import vitadapter_zoo as zoo",
        *rest,
        "for name in zoo.__all__: getattr(zoo, name)",
        "assert set(zoo.__all__) <= set(dir(zoo))",
    ]
    done = python("\n".join(lines))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", MOVED)
@pytest.mark.parametrize(
    "use", ["import zoo.{}", "from zoo.{} import __doc__", "from zoo import {}", "zoo.{}.__doc__"]
)
def test_a_moved_module_is_found_with_a_warning(name: str, use: str) -> None:
    old, new = f"vitadapter_zoo.{name}", f"vitadapter_zoo.{MOVED[name]}"
    line = use.format(name).replace("zoo", "vitadapter_zoo")
    done = python(f"import vitadapter_zoo\n{line}\nimport {new} as new\nassert {old} is new")
    assert done.returncode == 0, done.stderr
    # Shown by Python's own filters: it is the user's line that is warned of.
    assert f"<string>:2: DeprecationWarning: {old} has moved: import {new}" in done.stderr


def test_an_unknown_module_is_no_moved_one() -> None:
    done = python("import vitadapter_zoo.datasets")
    assert "ModuleNotFoundError: No module named 'vitadapter_zoo.datasets'" in done.stderr
