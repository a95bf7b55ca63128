"""The models that the web demo offers; one of them is in memory at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vitadapter_zoo.catalog import get_row, list_models
from vitadapter_zoo.errors import UnknownModelError, ZooError
from vitadapter_zoo.finder import cached_bytes, find
from vitadapter_zoo.loader import load
from vitadapter_zoo.text import quoted

if TYPE_CHECKING:
    from vitadapter_zoo.detections import Detections
    from vitadapter_zoo.images import ImageInput
    from vitadapter_zoo.models import MaskRCNN


def available(own: Sequence[str] = ()) -> list[str]:
    """Return the names of the models that load without a download.

    Args:
        own: folders that ``save_pretrained`` or ``train`` wrote, or repositories of the Hub in the
            cache; they come first.

    Returns:
        ``own``, the detector in the package, and the rows of the catalog whose weights are in the
        cache.

    Raises:
        ZooError: a name of ``own`` is not a model.
    """
    for name in own:
        find(name, offline=True)
    rows = [get_row(name) for name in list_models()]
    inside = [row.name for row in rows if row.made_here]
    cached = [row.name for row in rows if cached_bytes(row) is not None]
    return list(dict.fromkeys([*own, *inside, *cached]))


class Models:
    """Loads the chosen model on first use and keeps it until another one is chosen.

    Args:
        names: what may be chosen.
        device: where the network computes, ``"cpu"`` or ``"cuda"`` for instance.
    """

    def __init__(self, names: Sequence[str], device: str = "cpu") -> None:
        self.names = tuple(names)
        self.device = device
        self._lock = threading.Lock()  # two requests must not load two models
        self._loaded: tuple[str, MaskRCNN] | None = None

    def predict(self, name: str, image: ImageInput, score: float) -> Detections:
        """Detect the objects in one image.

        Args:
            name: one of ``names``.
            image: see `vitadapter_zoo.images.read_image`.
            score: lowest score that is kept, 0..1.

        Raises:
            UnknownModelError: the name is not offered.
            ZooError: the weights or the image cannot be used.
        """
        if name not in self.names:
            raise UnknownModelError(f"this page does not offer the model {quoted(name)}")
        with self._lock:
            if self._loaded is None or self._loaded[0] != name:
                self._loaded = None  # frees the memory before the next model needs it
                model = load(name, device=self.device, offline=True, progress=False)
                self._loaded = name, model
            return self._loaded[1].predict(image, score)[0]


class Work:
    """Counts the running requests, so that the server can stop between them.

    Python ends the threads of a server when it exits, and a thread that is inside of torch then
    aborts the process.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._stopped = False

    @contextmanager
    def request(self) -> Iterator[None]:
        """Mark the computation of one request as running.

        Raises:
            ZooError: the server stops.
        """
        with self._changed:
            if self._stopped:
                raise ZooError("The server stops.")
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def stop(self) -> None:
        """Refuse further requests, and wait for the running ones."""
        with self._changed:
            self._stopped = True
            self._changed.wait_for(lambda: not self._running)
