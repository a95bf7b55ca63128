"""Processes of their own for tests, forked from one that has imported torch already.

Importing torch takes longer than most checks. Run as a script, this file imports the modules that
it is given, reads requests and forks a process for each: with the environment, arguments and output
of its own, to be waited for or killed like any other.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

EVERYTHING = ("vitadapter_zoo.cli", "vitadapter_zoo.publishing.pretrained", "vitadapter_zoo.loader",
              "vitadapter_zoo.weights.download", "requests", "rich.progress")  # fmt: skip
# huggingface_hub, which timm imports, reads its environment when it is imported.
BEFORE_THE_HUB = ("torch", "torchvision", "torch._subclasses.fake_tensor", "cv2", "requests",
                  "safetensors.torch")  # fmt: skip
COMMAND = "from vitadapter_zoo.cli import main\nmain(prog_name='vitadapter-zoo')"


def heed_interrupts() -> None:
    """For ``preexec_fn``: what runs in a script's background ignores SIGINT, its children too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True)
class Done:
    """What a process left: its status (negative where a signal ended it) and its output."""

    returncode: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Worker:
    """A running process."""

    pid: int
    folder: Path
    workers: "Workers"

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return bool(self.workers.ask({"poll": self.pid}))

    def wait(self) -> Done:
        """Wait for its end."""
        status = self.workers.ask({"wait": self.pid})
        texts = [(self.folder / name).read_text() for name in ("stdout", "stderr")]
        return Done(status, *texts)


class Workers:
    """Starts processes that find the modules imported."""

    def __init__(self, modules: tuple[str, ...]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="workers-")
        self._server = subprocess.Popen(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # A forked process cannot use the threads that OpenBLAS started before.
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            preexec_fn=heed_interrupts,
        )
        self._started = 0

    def ask(self, request: dict[str, Any]) -> int:
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def start(
        self,
        code: str,
        *arguments: str,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        session: bool = False,
    ) -> Worker:
        """Start a process that runs code, with the caller's environment and what is given.

        Args:
            code: Python, run as a script.
            *arguments: of the script.
            cwd: its current folder; the caller's by default.
            environment: variables beside the caller's; folders in ``PYTHONPATH`` come first in
                the search for modules that are not imported yet.
            session: whether it leads a session, and a process group, of its own.
        """
        self._started += 1
        folder = Path(self._folder.name) / str(self._started)
        folder.mkdir()
        for name in ("stdout", "stderr"):  # there even where the process is killed at once
            (folder / name).touch()
        request = {
            "code": code,
            "arguments": arguments,
            "environment": {**os.environ, **(environment or {})},
            "cwd": str(cwd or Path.cwd()),
            "folder": str(folder),
            "session": session,
        }
        return Worker(self.ask(request), folder, self)

    def run(
        self,
        code: str,
        *arguments: str,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Done:
        """Run code to its end."""
        return self.start(code, *arguments, cwd=cwd, environment=environment).wait()


@functools.cache
def workers(modules: tuple[str, ...] = EVERYTHING) -> Workers:
    """The workers that all tests share; they end with the tests."""
    return Workers(modules)


def run(*arguments: str, cwd: Path | None = None) -> Done:
    """What the installed command does, in a process of its own that has torch imported."""
    return workers().run(COMMAND, *arguments, cwd=cwd)


def failure(*arguments: str) -> str:
    """The one error that a failing command writes to stderr."""
    result = run(*arguments)
    assert result.returncode != 0
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


def _work(request: dict[str, Any]) -> int:
    """In the new process: run the code as a script, and return the exit status."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(request["folder"]) / name, os.O_WRONLY)
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if request["session"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.argv = ["-c", *request["arguments"]]
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [*(folder for folder in path if folder), str(Path(__file__).parent)]
    status = 0
    try:
        exec(compile(request["code"], "<worker>", "exec"), {"__name__": "__main__"})  # noqa: S102
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:  # ends a process by the signal, as Python does
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _serve(requests: IO[str]) -> None:
    ended: dict[int, int] = {}
    for line in requests:
        request = json.loads(line)
        if "wait" in request or "poll" in request:
            pid, options = (
                (request["wait"], 0) if "wait" in request else (request["poll"], os.WNOHANG)
            )
            if pid not in ended:
                found, status = os.waitpid(pid, options)
                if found:
                    ended[pid] = os.waitstatus_to_exitcode(status)
            answer = ended[pid] if "wait" in request else int(pid not in ended)
        else:
            answer = os.fork()
            if not answer:
                os._exit(_work(request))
        print(answer, flush=True)


if __name__ == "__main__":
    for module in sys.argv[1:]:
        __import__(module)
    _serve(sys.stdin)
