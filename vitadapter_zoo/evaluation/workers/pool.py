"""A pool of workers that evaluate images; no result is lost if a worker dies or is slow.

``processes`` starts workers on this machine, ``ray_cluster`` on the nodes of a cluster. All workers
put their messages into one queue. These two modules notice that a worker has died and report it
with a `WorkerExit`; assigning images and handling failures is here, once for both.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Protocol, TypeAlias

import torch

from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.evaluation.dataset import Dataset, Image
from vitadapter_zoo.evaluation.evaluator import AHEAD, Evaluator, Task
from vitadapter_zoo.evaluation.identity import Facts, facts_of
from vitadapter_zoo.evaluation.ids import Id
from vitadapter_zoo.evaluation.loading import load_detector
from vitadapter_zoo.evaluation.options import Options
from vitadapter_zoo.evaluation.run import ImageResult

IMAGES_PER_WORKER = AHEAD + 2  # one in the network, one being encoded, the others decoded
MAX_EXITS = 3  # exits of workers with the same image in flight, or before they are ready


@dataclass(frozen=True)
class Spec:
    """What a worker needs to load the detector for itself.

    Attributes:
        name: load name, folder or repository.
        data: the data set, without its images and objects.
        options: of the evaluation. ``device`` is where the worker computes; ``cache_dir`` None is
            the cache of the worker's own machine.
    """

    name: str
    data: Dataset
    options: Options

    def with_threads(self, threads: int) -> Spec:
        """Return a copy with this number of CPU threads."""
        return replace(self, options=replace(self.options, threads=threads))

    def on_device(self, device: str) -> Spec:
        """Return a copy for another device."""
        return replace(self, options=replace(self.options, device=device))

    @property
    def device(self) -> torch.device:
        """The device on which the worker computes."""
        return torch.device(self.options.device or "cpu")


class WorkerEvaluator:
    """The detector in a worker; decoding and encoding run in parallel with the network.

    Args:
        spec: what to load.

    Raises:
        ZooError: what ``load`` raises; or the data set's classes are not the detector's.
    """

    def __init__(self, spec: Spec) -> None:
        threads = spec.options.threads
        _use_threads(threads)
        detector, _ = load_detector(spec.name, replace(spec.options, progress=False))
        self.facts = facts_of(detector, spec.data)
        self._evaluator = Evaluator(
            detector,
            spec.data.category_ids(detector.categories),
            ignore_exif=spec.data.ignore_exif,
        )
        # A thread for the network alone: the number of OpenMP threads is set for each thread.
        self._network = ThreadPoolExecutor(
            1, "network", initializer=_use_threads, initargs=(threads,)
        )

    def evaluate(self, task: Task) -> ImageResult:
        """Evaluate one image; several threads may call this at once."""
        prepared = self._evaluator.prepare(task)
        if isinstance(prepared, ImageResult):
            return prepared
        found = self._network.submit(self._evaluator.detect, prepared).result()
        return self._evaluator.finish(prepared, found)


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class WorkerExit:
    """The last message about a worker: why it ended."""

    reason: str


class Worker(Protocol):
    """A worker evaluates images and puts its messages into the queue that it was created with.

    The first message is its ``Facts``, or the ``ZooError`` that kept it from loading. Results
    follow. The last message, whatever ends the worker, is ``WorkerExit``.
    """

    @property
    def name(self) -> str:
        """The worker's name in messages."""

    def send(self, image: Image) -> None:
        """Send it another image without waiting. A worker that has ended ignores it."""

    def stop(self) -> None:
        """End the worker without waiting for its current images."""


Message: TypeAlias = Facts | ImageResult | ZooError | WorkerExit
Events: TypeAlias = "SimpleQueue[tuple[Worker, Message]]"


@dataclass
class _WorkerState:
    ready: bool = False
    alone: bool = False  # has one image only, one that was in flight when another worker died
    holding: set[Id] = field(default_factory=set)


@dataclass
class _Assignment:
    image: Image
    holders: list[Worker] = field(default_factory=list)


class Pool:
    """Workers and the images assigned to them; a context that ends the workers.

    Args:
        start: starts another worker, which reports to the given queue.
        size: number of workers.

    Attributes:
        size: number of workers, without those that were left out.
    """

    def __init__(self, start: Callable[[Events], Worker], size: int) -> None:
        self.size = size
        self._start = start
        self._events: Events = SimpleQueue()
        self._workers: dict[Worker, _WorkerState] = {}
        self._facts: Facts | None = None
        self._assignments: dict[Id, _Assignment] = {}  # in the order of their start
        self._retries: deque[Image] = deque()
        self._queue: deque[Image] = deque()
        self._exits: Counter[Id] = Counter()
        self._failed_starts = 0
        self._last_reason = ""

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers.clear()

    def facts(self) -> Facts:
        """Return the facts about the detector from the first worker that is ready.

        Raises:
            ZooError: a worker could not load it, or none could be started.
        """
        while self._facts is None:
            self._start_workers()
            self._on_message(*self._events.get())
        return self._facts

    def evaluate(
        self,
        images: Iterable[Image],
        keep: Callable[[ImageResult], None],
        deadline: float | None = None,
    ) -> None:
        """Evaluate images; ``keep`` gets each result once.

        Args:
            images: the images to evaluate.
            keep: called with each result, in this thread, in the order in which they finish.
            deadline: time of ``time.monotonic`` after which no further image is started.

        Raises:
            ZooError: an image ended three workers, no worker is left and none can be started, or
                one could not load the detector.
        """
        self.facts()
        self._queue.extend(images)
        while True:
            if deadline is not None and time.monotonic() > deadline:
                self._queue.clear()
                self._retries.clear()
            self._dispatch()
            if not (self._assignments or self._queue or self._retries):
                return
            self._start_workers()
            worker, message = self._events.get()
            if isinstance(message, ImageResult):
                if self._on_result(worker, message.image_id):
                    keep(message)
            else:
                self._on_message(worker, message)

    def _start_workers(self) -> None:
        """Start workers until there are enough."""
        while len(self._workers) < self.size and self._failed_starts < MAX_EXITS:
            self._workers[self._start(self._events)] = _WorkerState()
        if not self._workers:
            raise ZooError(
                f"no worker is left and none can be started ({self._last_reason}); finished images "
                "are stored, and the same command continues from there"
            )

    def _on_message(self, worker: Worker, message: Message) -> None:
        """Handle a message of a worker about itself."""
        state = self._workers.get(worker)
        if state is None:  # the worker was removed
            return
        if isinstance(message, Facts):
            self._on_worker_ready(worker, state, message)
        elif isinstance(message, ZooError):
            raise type(message)(f"{worker.name}: {message}")
        elif isinstance(message, WorkerExit):
            self._on_worker_exit(worker, state, message.reason)

    def _on_worker_ready(self, worker: Worker, state: _WorkerState, facts: Facts) -> None:
        if self._facts is None:
            self._facts = facts
        differing = _differences(self._facts, facts)
        if differing:
            warnings.warn(
                f"{worker.name} is left out: its results would have other digits: {differing}",
                stacklevel=2,
            )
            worker.stop()
            del self._workers[worker]
            self.size -= 1
            self._last_reason = differing
            return
        state.ready = True
        self._failed_starts = 0

    def _on_worker_exit(self, worker: Worker, state: _WorkerState, reason: str) -> None:
        """Handle the end of a worker, expected or not: its images go to other workers."""
        worker.stop()
        del self._workers[worker]
        self._last_reason = f"{worker.name}: {reason}"
        if not state.ready:
            self._failed_starts += 1
        for image_id in state.holding & self._assignments.keys():
            assignment = self._assignments[image_id]
            assignment.holders.remove(worker)
            self._exits[image_id] += 1
            if self._exits[image_id] >= MAX_EXITS:
                raise ZooError(
                    f"{assignment.image.path} was in flight in each of {MAX_EXITS} workers that "
                    f"ended (the last, {self._last_reason}): it is probably the cause; finished "
                    "images are stored, and the same command continues from there"
                )
            if not assignment.holders:
                del self._assignments[image_id]
                self._retries.append(assignment.image)

    def _on_result(self, worker: Worker, image_id: Id) -> bool:
        """Return whether this is the first result for an image."""
        state = self._workers.get(worker)
        if state is not None:
            state.holding.discard(image_id)
            state.alone = state.alone and bool(state.holding)
        return self._assignments.pop(image_id, None) is not None

    def _dispatch(self) -> None:
        """Assign images evenly, as long as a worker can take another."""
        while True:
            ready = [(worker, state) for worker, state in self._workers.items() if state.ready]
            for worker, state in sorted(ready, key=lambda pair: len(pair[1].holding)):
                image = self._next_for(worker, state)
                if image is not None:
                    assignment = self._assignments.setdefault(image.image_id, _Assignment(image))
                    assignment.holders.append(worker)
                    state.holding.add(image.image_id)
                    worker.send(image)
                    break
            else:
                return

    def _next_for(self, worker: Worker, state: _WorkerState) -> Image | None:
        if not state.holding and self._retries:
            # Without a second image, so that an image that ends workers costs no other image.
            state.alone = True
            return self._retries.popleft()
        if not state.alone and len(state.holding) < IMAGES_PER_WORKER and self._queue:
            return self._queue.popleft()
        if state.holding:
            return None
        # The queue is empty: repeat the oldest of the images that the fewest workers have.
        others = [one for one in self._assignments.values() if worker not in one.holders]
        return min(others, key=lambda one: len(one.holders)).image if others else None


def _differences(first: Facts, other: Facts) -> str:
    """Return the settings in which a worker differs from the first worker."""
    return "; ".join(
        f"{key} {other.identity.get(key)!r} instead of {value!r}"
        for key, value in first.identity.items()
        if other.identity.get(key) != value
    )
