"""The main job end to end without the internet: `make demo`.

First `vitadapter-zoo demo`: the detector in the package predicts and is verified. Then the
published networks: a checkpoint in the published format is made from stand-in weights and served
from this machine; the command that users run downloads, converts and loads it and detects on a
photo; then every stage is compared with the stored outputs of the original implementation.
"""

import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

import parity  # noqa: E402
import standins  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

import vitadapter_zoo  # noqa: E402

NAME = "adapter-t-deit-3x"


class Quiet(SimpleHTTPRequestHandler):
    """The standard library's file server without its log."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


def compare(console: Console, url: str) -> list[str]:
    """Print how far each stage is from the original's; return what is too far."""
    result = parity.compare(vitadapter_zoo.load(NAME, checkpoint=url))
    table = Table(title="Difference from the original implementation (same stand-in weights)")
    table.add_column("stage")
    table.add_column("measured", justify="right")
    table.add_column("tolerance", justify="right")
    table.add_row("preprocessed input, largest difference", f"{result.input:.1e}", "1e-06")
    for name, difference in result.features.items():
        table.add_row(f"{name}, relative to its largest value", f"{difference:.1e}", "1e-04")
    table.add_row("proposals with a counterpart", f"{result.proposals:.1%}", "99.0%")
    table.add_row("detections without a counterpart", str(result.unmatched), "0")
    table.add_row("smallest mask IoU", f"{result.mask_iou:.4f}", "0.99")
    table.add_row("masks equal to the last pixel", f"{result.rle_equal:.1%}", "-")
    console.print(table)
    return result.failures()


def main() -> int:
    """Run both parts; 0 when the AP is confirmed and every stage agrees with the original."""
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    output = Path("demo-output").absolute()
    shutil.rmtree(output, ignore_errors=True)
    served = output / "server"
    served.mkdir(parents=True)
    os.environ["VITADAPTER_ZOO_HOME"] = str(output / "cache")
    executable = str(Path(sys.executable).with_name("vitadapter-zoo"))

    console.print("[bold]1. A detector trained by this package, in the package[/bold]")
    verdict = subprocess.run([executable, "demo", "--out", str(output)]).returncode

    console.print("\n[bold]2. The published networks against the original's outputs[/bold]\n")
    filename = vitadapter_zoo.get_row(NAME).checkpoint_url.rpartition("/")[2]
    console.print(
        f"[bold]These are stand-in weights[/bold], not the published ones: they show that the "
        f"network computes what the original computes, not what {NAME} can see.\n"
    )
    torch.save(standins.checkpoint(NAME), served / filename)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(served))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{filename}"
        command = ["vitadapter-zoo", "predict", str(standins.PHOTO), "--model", NAME]
        arguments = [*command, "--checkpoint", url, "--out", str(output)]
        console.print(f"$ {' '.join(arguments)}", soft_wrap=True, style="bold")
        status = subprocess.run([executable, *arguments[1:]]).returncode
        if status:
            return status
        console.print()
        failures = compare(console, url)
        server.shutdown()

    for failure in failures:
        console.print(f"[red]{failure}[/red]")
    if not failures:
        console.print("[green]Every stage agrees with the original.[/green]")
    console.print("\n[bold]What to look at:[/bold]")
    for path in (*sorted((output / "pictures").glob("*.png")), output / "report" / "report.html"):
        if path.exists():
            console.print(f"  {path}", soft_wrap=True)
    console.print(f"  {output / 'rocket.png'} (stand-in weights)", soft_wrap=True)
    console.print(f"With the published weights: {' '.join(command)}", soft_wrap=True)
    return verdict or int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
