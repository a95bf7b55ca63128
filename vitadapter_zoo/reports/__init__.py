"""Reports of verifications: tables on the terminal, JSON, and HTML pages."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitadapter_zoo.reports.report import write

__all__ = ["write"]


def __getattr__(name: str) -> Any:
    # On first use: the command's progress line is in this folder too, and needs no report.
    if name == "write":
        from vitadapter_zoo.reports.report import write

        return write
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
