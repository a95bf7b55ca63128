"""``serve``: the web demo on this machine."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence

import click

from vitadapter_zoo.cli.models import model_names


@click.command(
    epilog="""\b
Examples:
  vitadapter-zoo serve
  vitadapter-zoo serve --model run/best --port 8000
""",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    shell_complete=model_names,
    metavar="NAME|FOLDER",
    help="Offer a saved model too; may be repeated. Models in the cache are always offered.",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. 0.0.0.0 lets other machines in; there is no password.",
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="0 takes any."
)
@click.option(
    "--max-megabytes",
    type=click.IntRange(min=1, max=1000),
    default=20,
    show_default=True,
    help="Refuse larger files.",
)
@click.option("--device", help="cpu, cuda, cuda:1, ...  [default: cuda if available]")
def serve(
    models: Sequence[str], host: str, port: int, max_megabytes: int, device: str | None
) -> None:
    """Serve a web page that detects objects in the pictures that are dropped on it.

    Ctrl-C stops it. Pictures are kept in a temporary folder, which is removed at the end.
    """
    from vitadapter_zoo import web
    from vitadapter_zoo.cli.devices import default_device, usable_device
    from vitadapter_zoo.web.app import temporary_folder
    from vitadapter_zoo.web.models import Work

    place = str(usable_device(device or default_device()))
    work = Work()
    with temporary_folder():
        page = web.build(models, device=place, work=work)
        url = web.launch(page, host=host, port=port, megabytes=max_megabytes)
        click.echo(f"{url} (Ctrl-C stops it)")
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        stop.wait()
        work.stop()
        page.close(verbose=False)
