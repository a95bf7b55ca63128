"""The command ``vitadapter-zoo``. torch and rich are imported only where they are used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import click

from vitadapter_zoo._version import __version__
from vitadapter_zoo.cli.demo import demo
from vitadapter_zoo.cli.hub import cache_group, card, convert, download
from vitadapter_zoo.cli.mmdet import compare, config
from vitadapter_zoo.cli.models import info, list_command
from vitadapter_zoo.cli.op import build_op_command, env_command
from vitadapter_zoo.cli.predict import predict
from vitadapter_zoo.cli.train import train
from vitadapter_zoo.cli.verify import score, verify
from vitadapter_zoo.errors import ZooError

INTERRUPTED = 130  # as shells count SIGINT


class _ZooGroup(click.Group):
    """Turns the zoo's errors into one line on stderr and exit status 1, without a traceback."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Click's own, except that an interrupt ends with 130: click's 1 would say *refuted*."""
        run: Callable[[], Any] = partial(
            super().main, args, prog_name, complete_var, standalone_mode=False, **extra
        )
        if not standalone_mode:
            return run()
        try:
            status = run()
        except click.ClickException as error:
            error.show()
            status = error.exit_code
        except click.Abort:
            click.echo("interrupted", err=True)
            status = INTERRUPTED
        sys.exit(status)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ZooError as error:
            raise click.ClickException(str(error)) from error


@click.group(
    cls=_ZooGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  vitadapter-zoo demo
  vitadapter-zoo list --filter 'adapter-*'
  vitadapter-zoo info adapter-l-augreg-3x
  vitadapter-zoo predict photo.jpg --model adapter-t-deit-3x --out overlays
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
