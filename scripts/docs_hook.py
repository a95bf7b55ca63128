"""Stops `mkdocs build` where a public name of the package has no entry in docs/api.md."""

import re
from typing import Any

from mkdocs.exceptions import Abort

import vitadapter_zoo

# A module is documented by what is in it, and the version has nothing to say.
NO_ENTRY = {
    "__version__", "backends", "evaluation", "models", "ops", "reports", "training", "web",
}  # fmt: skip


def missing(page: str) -> list[str]:
    """Public names without a line ``::: vitadapter_zoo.NAME`` in the page's text."""
    entries = set(re.findall(r"^::: vitadapter_zoo\.([\w.]+)$", page, re.MULTILINE))
    return [name for name in vitadapter_zoo.__all__ if name not in entries | NO_ENTRY]


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> None:
    """Called by mkdocs with the text of each page.

    Raises:
        Abort: the page is the API, and a public name is missing.
    """
    if page.file.src_uri == "api.md":
        absent = missing(markdown)
        if absent:
            raise Abort(f"docs/api.md: no entry for {', '.join(absent)}")
