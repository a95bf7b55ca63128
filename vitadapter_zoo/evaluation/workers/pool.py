"""Images shared out among workers that may die, be slow, or be many; whoever they are.

Processes of this machine are made by ``workers``, those of a cluster by ``cluster``. Both put what
their workers say into one queue, and everything else is here, once.
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
from vitadapter_zoo.evaluation.loading import load_detector
from vitadapter_zoo.evaluation.options import Options
from vitadapter_zoo.evaluation.run import ImageResult

IMAGES_PER_WORKER = AHEAD + 2  # one in the network, one being encoded, the others decoded
MAX_EXITS = 3  # of workers, with one image in flight or before they began, until that is the cause


@dataclass(frozen=True)
class Spec:
    """What a worker needs to load the detector for itself.

    Attributes:
        name: load name, folder or repository.
        data: the data set; its images are not looked at.
        options: of the evaluation. ``device`` is where the worker computes; ``cache_dir`` None is
            the cache of the worker's own machine.
    """

    name: str
    data: Dataset
    options: Options

    def with_threads(self, threads: int) -> Spec:
        """The same with so many threads of torch on the CPU."""
        return replace(self, options=replace(self.options, threads=threads))

    def on_device(self, device: str) -> Spec:
        """The same on a device."""
        return replace(self, options=replace(self.options, device=device))

    @property
    def device(self) -> torch.device:
        """Where the worker computes."""
        return torch.device(self.options.device or "cpu")


class WorkerEvaluator:
    """A worker's place: the detector, with decoding and encoding beside the network.

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
        self._evaluator = Evaluator(detector, spec.data.category_ids(detector.categories))
        # One thread of its own: the number of OpenMP threads belongs to the thread that asks.
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
    """A worker's last word, or what is said of it: why it is no more."""

    reason: str


class Worker(Protocol):
    """One that evaluates images and puts what it has to say into the queue it was made with.

    First its ``Facts``, or the ``ZooError`` that kept it from loading; then results; and, whatever
    it dies of, ``WorkerExit`` at last.
    """

    @property
    def name(self) -> str:
        """For messages."""

    def send(self, image: Image) -> None:
        """Give it one more image, without waiting. A dead worker takes it too, and is silent."""

    def stop(self) -> None:
        """End it at once, whatever it does."""


Message: TypeAlias = Facts | ImageResult | ZooError | WorkerExit
Events: TypeAlias = "SimpleQueue[tuple[Worker, Message]]"


@dataclass
class _WorkerState:
    ready: bool = False
    alone: bool = False  # with one image that was in flight when a worker died
    holding: set[int] = field(default_factory=set)


@dataclass
class _Assignment:
    image: Image
    holders: list[Worker] = field(default_factory=list)


class Pool:
    """Workers, and which images they have; a context that ends them.

    Args:
        start: makes one more worker that reports to the given queue.
        size: how many there are to be.

    Attributes:
        size: the same, less those that were left out.
    """

    def __init__(self, start: Callable[[Events], Worker], size: int) -> None:
        self.size = size
        self._start = start
        self._events: Events = SimpleQueue()
        self._workers: dict[Worker, _WorkerState] = {}
        self._facts: Facts | None = None
        self._assignments: dict[int, _Assignment] = {}  # in the order of their start
        self._retries: deque[Image] = deque()
        self._queue: deque[Image] = deque()
        self._exits: Counter[int] = Counter()
        self._failed_starts = 0
        self._last_reason = ""

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers.clear()

    def facts(self) -> Facts:
        """What the first worker to be ready says of the detector.

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
        """Evaluate images, each once as far as ``keep`` can see.

        Args:
            images: what to evaluate.
            keep: takes each result, in this thread, in the order in which they are finished.
            deadline: moment of ``time.monotonic`` after which no further image is begun.

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
                f"no worker is left and none can be started ({self._last_reason}); what is "
                "finished is kept, and the same command continues there"
            )

    def _on_message(self, worker: Worker, message: Message) -> None:
        """Note what a worker says of itself."""
        state = self._workers.get(worker)
        if state is None:  # it was sent away
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
                f"{worker.name} is left out, because it would give other digits: {differing}",
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
        """A worker is dead: what it had in flight is for others."""
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
                    f"ended (the last, {self._last_reason}): it is probably the cause; what is "
                    "finished is kept, and the same command continues there"
                )
            if not assignment.holders:
                del self._assignments[image_id]
                self._retries.append(assignment.image)

    def _on_result(self, worker: Worker, image_id: int) -> bool:
        """Whether this is the first result of an image."""
        state = self._workers.get(worker)
        if state is not None:
            state.holding.discard(image_id)
            state.alone = state.alone and bool(state.holding)
        return self._assignments.pop(image_id, None) is not None

    def _dispatch(self) -> None:
        """Give out images, evenly, as long as anybody has room."""
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
            # Alone, so that the image which ends workers takes no other one with it.
            state.alone = True
            return self._retries.popleft()
        if not state.alone and len(state.holding) < IMAGES_PER_WORKER and self._queue:
            return self._queue.popleft()
        if state.holding:
            return None
        # Nothing is left: take the longest-running of those that the fewest are at.
        others = [one for one in self._assignments.values() if worker not in one.holders]
        return min(others, key=lambda one: len(one.holders)).image if others else None


def _differences(first: Facts, other: Facts) -> str:
    """In what a worker would compute something else than the first one."""
    return "; ".join(
        f"{key} {other.identity.get(key)!r} instead of {value!r}"
        for key, value in first.identity.items()
        if other.identity.get(key) != value
    )
