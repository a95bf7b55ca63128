"""``env`` and ``build-op``: what computes here, and the compiled operator."""

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

    It goes to the cache, where it is found from then on. Needs a C++20 compiler (g++ 12 or clang
    14); compiles for CUDA too where there is an nvcc of the CUDA version of torch.
    VITADAPTER_ZOO_CUDA=0 or 1 overrides that.
    """
    from rich.console import Console

    from vitadapter_zoo.ops.build import build

    console = Console(stderr=True)
    with console.status("Compiling, half a minute or so"):
        libraries = build()
    for library in libraries:
        click.echo(library)
