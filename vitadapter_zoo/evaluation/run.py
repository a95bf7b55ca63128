"""Run directories: the results so far, stored so that an interrupted run continues.

A run directory has ``run.json`` with the identity of the run, and ``predictions.jsonl`` with one
line for each image, which begins with the CRC-32 of the rest. An incomplete or damaged line counts
as not written.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.evaluation.ids import Id
from vitadapter_zoo.text import parse_json
from vitadapter_zoo.weights import atomic, cache

RUN = "run.json"
PREDICTIONS = "predictions.jsonl"


@dataclass(frozen=True)
class ImageResult:
    """The detections of one image in COCO's terms, best score first.

    Attributes:
        image_id: the annotation file's.
        size: (height, width) in pixels.
        boxes: ``[x, y, width, height]`` in image pixels.
        scores: 0..1.
        category_ids: the annotation file's.
        masks: compressed RLE counts.
        image_sha256: of the image file.
        skipped: why the image was left out; empty if it was evaluated.
    """

    image_id: Id
    size: tuple[int, int]
    boxes: Sequence[Sequence[float]] = ()
    scores: Sequence[float] = ()
    category_ids: Sequence[Id] = ()
    masks: Sequence[str] = ()
    image_sha256: str = ""
    skipped: str = ""

    def segmentations(self) -> list[Any]:
        """The masks as COCO's RLE dictionaries."""
        size = list(self.size)
        return [{"size": size, "counts": counts} for counts in self.masks]

    def to_coco(self) -> list[dict[str, Any]]:
        """COCO results: one JSON-ready dictionary per detection."""
        return [
            {
                "image_id": self.image_id,
                "category_id": category,
                "bbox": list(box),
                "score": score,
                "segmentation": segmentation,
            }
            for category, box, score, segmentation in zip(
                self.category_ids, self.boxes, self.scores, self.segmentations(), strict=True
            )
        ]


@dataclass
class Run:
    """An open run directory; ``open_run`` makes it.

    Attributes:
        directory: its path.
        results: by image id, including those of earlier processes.
    """

    directory: Path
    results: dict[Id, ImageResult] = field(default_factory=dict)

    def append(self, result: ImageResult) -> None:
        """Store the result of an image; it is on the disk when this returns.

        Raises:
            ZooError: it cannot be written. Earlier results stay complete.
        """
        line = _line(result)
        path = self.directory / PREDICTIONS
        with _writing(self.directory), path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                # On a full disk a raw write may write less; only its return value tells.
                written = 0
                while written < len(line):
                    written += file.write(line[written:]) or 0
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(end)
                raise
        self.results[result.image_id] = result


@contextlib.contextmanager
def open_run(directory: Path, identity: Mapping[str, Any]) -> Iterator[Run]:
    """Start a run, or continue the run in this directory.

    Args:
        directory: created if it does not exist.
        identity: everything that the results depend on; a run with another identity is refused.

    Raises:
        ZooError: the directory belongs to another run or process, or cannot be written to.
    """
    with _writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with cache.locked(directory, directory.name, wait=False):
        _claim(directory / RUN, identity)
        yield Run(directory, _read(directory / PREDICTIONS))


def has_begun(directory: Path, identity: Mapping[str, Any]) -> bool:
    """Whether the directory holds a run with this identity."""
    try:
        return parse_json((directory / RUN).read_bytes()) == json.loads(json.dumps(identity))
    except (OSError, ValueError):
        return False


def _claim(path: Path, identity: Mapping[str, Any]) -> None:
    """Write the identity of the run, or check that the stored identity is the same."""
    wanted = json.loads(json.dumps(identity))
    if not path.exists():
        atomic.write_json(path, wanted)
        return
    try:
        known = parse_json(path.read_bytes())
        differing = [
            f"{key}: {known.get(key)!r} then, {wanted.get(key)!r} now"
            for key in sorted({*known, *wanted})
            if known.get(key) != wanted.get(key)
        ]
    except (OSError, ValueError, AttributeError) as error:
        raise ZooError(
            f"{path} cannot be read ({error}); choose another run directory with --run"
        ) from error
    if differing:
        raise ZooError(
            f"{path.parent} holds another run, and results are not mixed ({'; '.join(differing)}); "
            "choose another run directory with --run"
        )


def _line(result: ImageResult) -> bytes:
    content = json.dumps(asdict(result), separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(content), content)


def _parse(line: bytes) -> ImageResult | None:
    """The result in a line; None if the line is incomplete or damaged."""
    checksum, _, content = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(content):
        return None
    values = json.loads(content)
    return ImageResult(**{**values, "size": tuple(values["size"])})


def _read(path: Path) -> dict[Id, ImageResult]:
    """The results of a run; incomplete and damaged lines are removed from the file."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        lines = file.readlines()
    results = [_parse(line) for line in lines]
    if None in results:
        with atomic.replacing(path) as partial:
            whole = (line for line, result in zip(lines, results, strict=True) if result)
            partial.write_bytes(b"".join(whole))
    return {result.image_id: result for result in results if result}


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ZooError(
            f"cannot write to the run directory {directory}: {error.strerror or error}; finished "
            "images are stored: free some space and run the same command again, or choose another "
            "directory with --run"
        ) from error
