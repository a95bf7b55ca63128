"""What a run has found so far, kept so that nothing is computed twice and nothing is lost.

A run is a directory with ``run.json``, which says what was run, and ``predictions.jsonl``: a line
for each image, its CRC-32 in front. A line that is torn or damaged counts as not written.
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
        skipped: why the image was left out; empty where it was not.
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
        directory: where it is.
        results: by image id, those of earlier processes too.
    """

    directory: Path
    results: dict[Id, ImageResult] = field(default_factory=dict)

    def append(self, result: ImageResult) -> None:
        """Keep one image's result; on the disk when this returns.

        Raises:
            ZooError: it cannot be written. What was written before stays whole.
        """
        line = _line(result)
        path = self.directory / PREDICTIONS
        with _writing(self.directory), path.open("ab", buffering=0) as file:
            whole = file.tell()
            try:
                # A raw write may stop short on a full disk, and says so only in what it returns.
                written = 0
                while written < len(line):
                    written += file.write(line[written:]) or 0
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(whole)
                raise
        self.results[result.image_id] = result


@contextlib.contextmanager
def open_run(directory: Path, identity: Mapping[str, Any]) -> Iterator[Run]:
    """Begin a run, or continue the one that is there.

    Args:
        directory: made where it does not exist.
        identity: what the results depend on; a run of another identity is refused.

    Raises:
        ZooError: the directory belongs to another run or process, or cannot be written to.
    """
    with _writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with cache.locked(directory, directory.name, wait=False):
        _claim(directory / RUN, identity)
        yield Run(directory, _read(directory / PREDICTIONS))


def _claim(path: Path, identity: Mapping[str, Any]) -> None:
    """Write what is run, or check that it is what was run before."""
    wanted = json.loads(json.dumps(identity))
    if not path.exists():
        atomic.write_json(path, wanted)
        return
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
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
    """The result in a line; None where the line is torn or damaged."""
    checksum, _, content = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(content):
        return None
    values = json.loads(content)
    return ImageResult(**{**values, "size": tuple(values["size"])})


def _read(path: Path) -> dict[Id, ImageResult]:
    """The whole lines of a run; what is torn or damaged is taken out of the file."""
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
            f"cannot write to the run directory {directory}: {error.strerror or error}; what is "
            "finished is kept: make room and give the same command again, or choose another place "
            "with --run"
        ) from error
