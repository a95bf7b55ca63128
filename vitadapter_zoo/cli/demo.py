"""``demo``: run the detector that is in the package, without a network."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Sequence

import click

from vitadapter_zoo import settings
from vitadapter_zoo.catalog import get_row
from vitadapter_zoo.cli.models import list_command
from vitadapter_zoo.cli.predict import predict
from vitadapter_zoo.cli.verify import verify
from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.text import PATH, shown

MODEL = "adapter-n-emoji"
PICTURES = ("000190.jpg", "000197.jpg", "000054.jpg")  # of the row's validation images
SCORE = "0.5"  # lowest that is drawn


@click.command(
    epilog="""\b
Examples:
  vitadapter-zoo demo
  vitadapter-zoo demo --out /tmp/demo
\b
Exit status: that of `verify`.
""",
)
@click.option(
    "--out",
    default="demo-output",
    show_default=True,
    metavar="DIR",
    help="Folder for the pictures and the report.",
)
def demo(out: str) -> None:
    """Detect objects with adapter-n-emoji, then confirm its AP.

    Weights and images are in the package. It takes about a minute on 2 cores.
    """
    files = get_row(MODEL).data_files
    if files is None:
        raise ZooError(f"{MODEL} has no images in this package; install vitadapter-zoo again")
    pictures = [str(files[1] / name) for name in PICTURES]
    folder = settings.expanded(out)
    drawn, report = folder / "pictures", folder / "report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ZooError(f"cannot write to {shown(folder, PATH)}: {error.strerror}") from error

    _run(list_command, ["--filter", MODEL])
    _run(predict, [*pictures, "--model", MODEL, "--out", str(drawn), "--score", SCORE, "--offline"])
    # A new run directory, so that a second demo computes again instead of reading its results.
    with tempfile.TemporaryDirectory(prefix="vitadapter-zoo-") as run:
        options = [MODEL, "--report", str(report), "--offline"]
        status = _run(verify, options, hidden=["--run", run])

    click.secho("\nSee what it found:", bold=True)
    for name in PICTURES:
        click.echo(f"  {shown((drawn / name).with_suffix('.png'), PATH)}")
    click.echo(f"  {shown(report / 'report.html', PATH)}")
    click.get_current_context().exit(status)


def _run(command: click.Command, arguments: Sequence[str], *, hidden: Sequence[str] = ()) -> int:
    """Print a command line and run it in this process.

    Args:
        command: one of the program's commands.
        arguments: shown and passed on.
        hidden: passed on only.

    Returns:
        Its exit status.

    Raises:
        ZooError: an error of the command; click.ClickException, one of `verify`.
    """
    line = shlex.join(["vitadapter-zoo", str(command.name), *arguments])
    click.secho(f"\n$ {line}", bold=True)
    parent = click.get_current_context()
    try:
        with command.make_context(command.name, [*arguments, *hidden], parent=parent) as context:
            command.invoke(context)
    except click.exceptions.Exit as end:
        return end.exit_code
    return 0
