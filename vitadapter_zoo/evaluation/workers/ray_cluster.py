"""Workers on a Ray cluster: actors, each with its own detector and device."""

from __future__ import annotations

import contextlib
import importlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.evaluation.dataset import Image
from vitadapter_zoo.evaluation.evaluator import Task, read
from vitadapter_zoo.evaluation.identity import Facts
from vitadapter_zoo.evaluation.run import ImageResult
from vitadapter_zoo.evaluation.workers.pool import (
    IMAGES_PER_WORKER,
    Events,
    Pool,
    Spec,
    WorkerEvaluator,
    WorkerExit,
)

PLACING_SECONDS = 300  # until a node has room for a worker; autoscalers need minutes


@contextlib.contextmanager
def actors(spec: Spec, address: str, count: int | None, most: int) -> Iterator[Pool]:
    """Create a pool on a Ray cluster, which this process joins while the block runs.

    Each worker has a GPU if ``spec.device`` is ``cuda``, and as many CPUs as it has threads
    otherwise. Workers get the bytes of the images; each loads the detector from its node's cache.

    Args:
        spec: the detector that the workers load.
        address: ``"auto"`` or a cluster's address.
        count: number of workers; by default that of the cluster's GPUs, or of its nodes with CPUs.
        most: largest number of workers that is useful.

    Raises:
        ZooError: Ray is not installed, there is no cluster, or it has no room for a worker.
    """
    ray = _ray()
    joined = not ray.is_initialized()
    if joined:
        try:
            _check_reachable(address)
            ray.init(address=address, logging_level="warning", log_to_driver=False)
        # Depending on the address Ray raises ConnectionError, ValueError, RuntimeError or its own.
        except Exception as error:
            raise ZooError(
                f"cannot join the Ray cluster {address!r}: {_first_line(error)}; start one with "
                "`ray start --head` and `ray start --address=HOST:PORT` on the other machines, or "
                "leave --ray out"
            ) from error
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        spec, options, room = _plan(spec, nodes, count)
        size = max(1, min(count or room, most))
        remote = ray.remote(_Actor).options(
            scheduling_strategy="SPREAD", max_concurrency=IMAGES_PER_WORKER + 1, **options
        )
        shared = ray.put(spec)
        with Pool(lambda events: _Remote(ray, remote.remote(), shared, events), size) as pool:
            yield pool
    finally:
        if joined:
            ray.shutdown()


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ZooError(
            "Ray is not installed here: `pip install 'vitadapter-zoo[ray]'`, on every node, or "
            "leave --ray out"
        ) from error


def _check_reachable(address: str) -> None:
    """Fail at once if nothing listens at the address; Ray would wait for minutes."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _plan(
    spec: Spec, nodes: list[dict[str, float]], count: int | None
) -> tuple[Spec, dict[str, float], int]:
    """Return the spec with its threads, a worker's resources, and the default worker count."""
    if spec.device.type == "cuda":
        gpus = int(sum(node.get("GPU", 0) for node in nodes))
        if not gpus:
            raise ZooError("no node of the Ray cluster has a GPU: leave --device out, or add one")
        return spec, {"num_gpus": 1, "num_cpus": 0}, gpus
    cores = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
    if not cores:
        raise ZooError("no node of the Ray cluster offers CPUs: start one with --num-cpus")
    threads = spec.options.threads
    if threads is None:
        each = -(-(count or len(cores)) // len(cores))  # workers of a node, rounded up
        threads = max(1, min(cores) // each)
    if threads > max(cores):
        raise ZooError(
            f"no node of the Ray cluster has {threads} CPUs, which so many threads ask for: "
            f"the largest has {max(cores)}"
        )
    return spec.with_threads(threads), {"num_cpus": threads}, len(cores)


class _Actor:
    """The worker on a node."""

    def place(self) -> str:
        """Return the name of the node, once the actor runs on one."""
        return str(_ray().util.get_node_ip_address())

    def load(self, spec: Spec) -> Facts | ZooError:
        """Load the detector; an error is returned, because Ray would wrap it if it were raised."""
        try:
            self._evaluator = WorkerEvaluator(spec)
        except ZooError as error:
            return error
        return self._evaluator.facts

    def evaluate(self, task: Task) -> ImageResult:
        """Evaluate one image."""
        return self._evaluator.evaluate(task)


class _Remote:
    """A worker on a node, called through Ray."""

    def __init__(self, ray: Any, actor: Any, spec: Any, events: Events) -> None:
        self._ray, self._actor, self._spec, self._events = ray, actor, spec, events
        self.name = "a Ray worker"
        placed = actor.place.remote().future()
        placed.add_done_callback(self._load)
        self._late = threading.Timer(PLACING_SECONDS, self._give_up)
        self._late.daemon = True
        self._late.start()

    def _load(self, placed: Future[str]) -> None:
        self._late.cancel()
        if placed.exception() is None:
            self.name = f"the Ray worker on node {placed.result()}"
            self._actor.load.remote(self._spec).future().add_done_callback(self._tell)
        else:
            self._tell(placed)

    def send(self, image: Image) -> None:
        """Send the image's bytes."""
        self._actor.evaluate.remote(read(image)).future().add_done_callback(self._tell)

    def stop(self) -> None:
        """Kill the actor."""
        self._late.cancel()
        self._ray.kill(self._actor)

    def _tell(self, done: Future[Any]) -> None:
        error = done.exception()
        message = WorkerExit(_reason(error)) if error is not None else done.result()
        self._events.put((self, message))

    def _give_up(self) -> None:
        reason = f"no node of the cluster had room for it within {PLACING_SECONDS} s"
        self._events.put((self, WorkerExit(reason)))


def _reason(error: BaseException) -> str:
    """Return Ray's message on one line."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):  # raised by the actor's own code
        return f"{type(cause).__name__}: {cause}"
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())[:400]


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
