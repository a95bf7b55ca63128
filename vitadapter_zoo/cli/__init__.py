"""The command ``vitadapter-zoo``; only the commands that need torch and rich import them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import click

from vitadapter_zoo._version import __version__
from vitadapter_zoo.cli import failures
from vitadapter_zoo.cli.card import card
from vitadapter_zoo.cli.demo import demo
from vitadapter_zoo.cli.export import export
from vitadapter_zoo.cli.hub import cache_group, convert, download
from vitadapter_zoo.cli.mmdet import compare, config
from vitadapter_zoo.cli.models import info, list_command
from vitadapter_zoo.cli.op import build_op_command, env_command
from vitadapter_zoo.cli.predict import predict
from vitadapter_zoo.cli.score import score
from vitadapter_zoo.cli.serve import serve
from vitadapter_zoo.cli.train import train
from vitadapter_zoo.cli.verify import verify


class _ZooGroup(click.Group):
    """A group whose commands exit with 2 on errors: click's 1 would mean *refuted*."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command and exit with 0 to 3, 130 (interrupted) or 141 (the reader has gone)."""
        run: Callable[[], Any] = partial(
            super().main, args, prog_name, complete_var, standalone_mode=False, **extra
        )
        if not standalone_mode:
            return run()
        try:
            with failures.plain_warnings():
                status = run() or 0
        except click.ClickException as error:
            status = failures.status_after(error)
        except click.Abort:
            click.echo("interrupted", err=True)
            status = failures.INTERRUPTED
        except SystemExit as end:
            status = failures.status_of(end)
        sys.exit(failures.finish_output(status))

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Read the arguments; ``--help`` and ``--version`` print here already."""
        try:
            return super().make_context(info_name, args, parent, **extra)
        except OSError as error:
            raise failures.output_failure(error) from error

    def invoke(self, ctx: click.Context) -> Any:
        """Turn any exception of a command into one line, after a traceback with ``--debug``."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except (KeyboardInterrupt, SystemExit):
            raise
        # A panic of a library in Rust is no Exception.
        except BaseException as error:
            raise failures.failure(error, ctx) from error


@click.group(
    cls=_ZooGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  vitadapter-zoo demo
  vitadapter-zoo list --filter 'adapter-*'
  vitadapter-zoo info adapter-l-augreg-3x
  vitadapter-zoo predict photo.jpg --model adapter-t-deit-3x --out overlays
\b
Completion of commands, options and model names:
  bash, in ~/.bashrc:  eval "$(_VITADAPTER_ZOO_COMPLETE=bash_source vitadapter-zoo)"
  zsh, in ~/.zshrc:    eval "$(_VITADAPTER_ZOO_COMPLETE=zsh_source vitadapter-zoo)"
  fish:                _VITADAPTER_ZOO_COMPLETE=fish_source vitadapter-zoo | source
""",
)
@click.version_option(__version__, prog_name="vitadapter-zoo")
def main() -> None:
    """ViT-Adapter + Mask R-CNN checkpoints on current PyTorch."""


for command in (
    list_command,
    info,
    demo,
    predict,
    serve,
    export,
    train,
    verify,
    score,
    download,
    cache_group,
    convert,
    card,
    config,
    compare,
    env_command,
    build_op_command,
):
    main.add_command(command)
failures.add_debug_option(main)
