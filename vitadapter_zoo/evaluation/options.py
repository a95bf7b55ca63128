"""The options of an evaluation, shared by the command line, ``verify`` and the workers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vitadapter_zoo import settings

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a detector is loaded and evaluated; ``verify`` describes each option.

    Raises:
        ValueError: a number is too small, workers with ``backend="mmdet"``, or an unknown
            ``backend``.
    """

    checkpoint: str | os.PathLike[str] | None = None
    limit: int | None = None
    max_minutes: float | None = None
    seed: int = 0
    expected: tuple[float, float] | None = None
    skip_bad_images: bool = False
    device: str | torch.device | None = None
    dtype: torch.dtype | None = None
    backend: Literal["native", "mmdet"] = "native"
    workers: int | None = None
    ray: str | None = None
    threads: int | None = None
    run: str | os.PathLike[str] | None = None
    cache_dir: settings.Home = None
    offline: bool | None = None
    progress: bool = True
    allow_nonfinite: bool = False
    allow_tf32: bool = False
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.backend not in ("native", "mmdet"):
            raise ValueError(f"backend={self.backend!r}: there are 'native' and 'mmdet'")
        if self.backend == "mmdet" and self.has_workers:
            raise ValueError("the mmdet backend runs in this process: leave workers and ray out")
        if _is_below(self.limit, 1) or not (self.max_minutes is None or self.max_minutes > 0):
            raise ValueError("limit and max_minutes must be numbers above 0")
        if _is_below(self.workers, 1) or _is_below(self.threads, 1):
            raise ValueError("workers and threads must be at least 1")
        if max(self.workers or 1, self.threads or 1) > settings.MOST_PROCESSES:
            raise ValueError(f"workers and threads must be at most {settings.MOST_PROCESSES}")
        batch_size = 1 if self.batch_size is None else self.batch_size
        if batch_size < 1 or (batch_size > 1 and self.backend == "mmdet"):
            raise ValueError("batch_size must be at least 1, and 1 with the mmdet backend")
        if batch_size > 1 and self.has_workers:
            raise ValueError("workers compute one image at a time: leave batch_size or workers out")
        if self.expected is not None and not all(0 <= points <= 100 for points in self.expected):
            raise ValueError(f"expected={self.expected}: an AP lies in 0..100")

    @property
    def has_workers(self) -> bool:
        """Whether other processes compute."""
        return self.ray is not None or (self.workers or 1) > 1

    @property
    def is_part(self) -> bool:
        """Whether a random part of the data set is evaluated."""
        return self.limit is not None or self.max_minutes is not None


def _is_below(value: int | None, least: int) -> bool:
    return value is not None and value < least
