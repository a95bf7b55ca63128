"""Workers on this machine: processes, each with its own detector and device."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import NoReturn

import torch

from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.evaluation.dataset import Image
from vitadapter_zoo.evaluation.evaluator import read
from vitadapter_zoo.evaluation.workers.pool import (
    IMAGES_PER_WORKER,
    Events,
    Message,
    Pool,
    Spec,
    WorkerEvaluator,
    WorkerExit,
)


def processes(spec: Spec, count: int) -> Pool:
    """Create a pool of ``count`` processes.

    On ``cuda`` they take the devices in turn. On the CPU each uses its share of the cores, at least
    one, unless the options say how many.
    """
    places = itertools.cycle(_places(spec, count))
    return Pool(lambda events: ProcessWorker(next(places), events), count)


def _places(spec: Spec, count: int) -> list[Spec]:
    device, threads = spec.device, spec.options.threads
    if device.type == "cpu":
        return [spec.with_threads(threads or max(1, cores() // count))]
    if device.index is not None:
        return [spec]
    devices = torch.cuda.device_count()
    return [spec.on_device(f"{device.type}:{index}") for index in range(max(1, devices))]


def cores() -> int:
    """Return the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class ProcessWorker:
    """A worker in its own process, connected by a pipe."""

    def __init__(self, spec: Spec, events: Events) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(spec, theirs), daemon=True)
        with _interrupts_held():
            self._process.start()
        theirs.close()
        self.name = f"worker process {self._process.pid}"
        self._waiting = threading.Lock()  # of two threads that join a process, one may miss its end
        # A thread for each worker: a process that stops within a message does not block the others.
        listener = threading.Thread(
            target=self._listen, args=(self._process, events), name=self.name, daemon=True
        )
        listener.start()

    def send(self, image: Image) -> None:
        """Send the image's path; the process reads the file."""
        with contextlib.suppress(OSError):  # it ended, and the listener reports that
            self._pipe.send(image)

    def stop(self) -> None:
        """Kill the process, and wait until it has ended."""
        self._process.kill()
        with self._waiting:
            self._process.join()

    def _listen(self, process: BaseProcess, events: Events) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                events.put((self, self._pipe.recv()))
        with self._waiting:
            process.join()
        events.put((self, WorkerExit(_cause(process.exitcode))))


def _cause(exit_code: int | None) -> str:
    if exit_code == -signal.SIGKILL:
        return "killed, perhaps by the system because memory ran out: use fewer workers"
    if exit_code is not None and exit_code < 0:
        return f"ended by {signal.Signals(-exit_code).name}"
    return (
        f'ended with exit status {exit_code} (a script needs `if __name__ == "__main__":` around '
        "its code, because the workers import it)"
    )


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hide Ctrl-C from processes that start in the block; this process gets it and ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(spec: Spec, pipe: Connection) -> None:
    """Run in a worker process until it is killed or its parent ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sending = threading.Lock()

    def say(message: Message) -> None:
        with sending:
            pipe.send(message)

    def evaluate(image: Image) -> None:
        try:
            say(evaluator.evaluate(read(image)))
        except BaseException as error:  # a panic in Rust is no Exception
            _give_up(say, error)

    try:
        evaluator = WorkerEvaluator(spec)
    except ZooError as error:
        say(error)
        return
    except BaseException as error:
        _give_up(say, error)
    say(evaluator.facts)
    with ThreadPoolExecutor(IMAGES_PER_WORKER, "image") as threads:
        while True:
            try:
                image = pipe.recv()
            except (EOFError, OSError):  # the parent ended
                os._exit(1)
            threads.submit(evaluate, image)


def _give_up(say: Callable[[Message], None], error: BaseException) -> NoReturn:
    """Report an error and exit without waiting for other threads, which may take minutes."""
    with contextlib.suppress(OSError):
        say(WorkerExit(f"{type(error).__name__}: {error}"))
    os._exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
