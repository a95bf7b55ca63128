"""COCO's evaluation of a detector, and the verdict on its published AP."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitadapter_zoo.evaluation.dataset import Dataset, read_dataset
    from vitadapter_zoo.evaluation.results_file import read_results
    from vitadapter_zoo.evaluation.verdict import Verification

__all__ = ["Dataset", "Verification", "read_dataset", "read_results"]

# The modules are imported on first use: importing the scorer takes a second, and reading a data set
# does not need it.
_LAZY = {
    "Dataset": "vitadapter_zoo.evaluation.dataset",
    "Verification": "vitadapter_zoo.evaluation.verdict",
    "read_dataset": "vitadapter_zoo.evaluation.dataset",
    "read_results": "vitadapter_zoo.evaluation.results_file",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
