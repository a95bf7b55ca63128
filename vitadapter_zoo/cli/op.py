"""``env`` and ``build-op``: show what computes the operators here, and compile them."""

from __future__ import annotations

import json
from typing import Any

import click


@click.command("env", epilog="\b\nExample:\n  vitadapter-zoo env --json\n")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def env_command(as_json: bool) -> None:
    """Show versions, the machine, and what computes deformable attention and masks on it."""
    from vitadapter_zoo.environment import environment

    found = environment()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for section, entries in found.items():
        click.echo(section)
        for key, value in entries.items():
            click.echo(f"  {key:<24} {_text(value)}")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        state = "compiled" if value["compiled"] else "PyTorch's own operators"
        return f"{state}: {value['why']}"
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return "-" if value is None else str(value)


@click.command("build-op", epilog="\b\nExample:\n  vitadapter-zoo build-op\n")
def build_op_command() -> None:
    """Compile the operators against the installed torch.

    The libraries are stored in the cache, and every later process loads them from there. Needs a
    C++20 compiler (g++ 12 or clang 14). Compiles for CUDA too if there is an nvcc of torch's CUDA
    version; VITADAPTER_ZOO_CUDA=0 or 1 overrides that.
    """
    from rich.console import Console

    from vitadapter_zoo.ops.build import build

    console = Console(stderr=True)
    with console.status("Compiling, a minute or two; longer for CUDA"):
        libraries = build()
    for library in libraries:
        click.echo(library)
