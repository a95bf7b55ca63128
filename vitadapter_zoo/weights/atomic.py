"""Write files atomically: after a crash there is the old file, the new file, or none."""

import contextlib
import datetime
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitadapter_zoo.errors import ZooError


def now() -> str:
    """The current time as ISO 8601, UTC, to the second."""
    return time_of(time.time())


def time_of(timestamp: float) -> str:
    """A time in seconds since 1970 as ISO 8601, UTC, to the second."""
    zone = datetime.timezone.utc
    return datetime.datetime.fromtimestamp(timestamp, zone).isoformat(timespec="seconds")


def hashed(path: Path) -> "hashlib._Hash":
    """The running sha256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest


def sha256(path: Path) -> str:
    """The sha256 of a file's content, as hexadecimal digits."""
    return hashed(path).hexdigest()


def sha256_of_all(paths: Sequence[Path]) -> str:
    """One sha256 for one or several files, such as the shards of a checkpoint.

    For a single file it is the file's own sha256. For several files it is the sha256 of the output
    of ``sha256sum`` in the order of their names: ``sha256sum model-*.safetensors | sha256sum``.
    """
    if len(paths) == 1:
        return sha256(paths[0])
    lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(paths, key=lambda p: p.name)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@contextlib.contextmanager
def writing_to(directory: Path) -> Iterator[None]:
    """Turn errors of the operating system into one error with advice.

    Raises:
        ZooError: the directory cannot be written to, or the disk is full.
    """
    try:
        yield
    except OSError as error:
        raise ZooError(
            f"cannot write to {directory}: {error.strerror or error}; free some space there "
            "(`vitadapter-zoo cache prune`), or choose another place (VITADAPTER_ZOO_HOME, "
            "cache_dir or --out)"
        ) from error


def check_space(directory: Path, needed: int) -> None:
    """Check the free disk space before a file is written.

    Args:
        directory: where the file will be written.
        needed: its size in bytes.

    Raises:
        ZooError: the disk has less free space.
    """
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise ZooError(
            f"the disk is too full: {needed / 1e6:,.0f} MB are needed in {directory} and "
            f"{free / 1e6:,.0f} MB are free; make room (`vitadapter-zoo cache prune`) or choose "
            "another place (VITADAPTER_ZOO_HOME, cache_dir or --out)"
        )


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary file that replaces ``target`` when the block succeeds.

    The file is flushed to disk before it is renamed, and removed if the block fails. It has a
    folder of its own because libraries may write temporary files next to it. The folder's name is
    fixed, so the next call removes what a killed process left; the caller must hold a lock.

    Raises:
        ZooError: the directory cannot be written to, or the disk is full.
    """
    scratch = target.with_name(f".{target.name}.tmp")
    partial = scratch / target.name
    with writing_to(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        if scratch.exists():
            shutil.rmtree(scratch)
        scratch.mkdir()
        try:
            yield partial
            with partial.open("rb") as written:
                os.fsync(written.fileno())
            partial.chmod(0o644)
            partial.replace(target)
        finally:
            shutil.rmtree(scratch)


def write_text(target: Path, text: str) -> None:
    """Write a text file in one step, as ``replacing`` does.

    Raises:
        ZooError: the directory cannot be written to, or the disk is full.
    """
    with replacing(target) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(target: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that people can read, in one step.

    Raises:
        ZooError: the directory cannot be written to, or the disk is full.
    """
    write_text(target, json.dumps(content, indent=2) + "\n")


def part_of(target: Path) -> Path:
    """The path of an incomplete download of ``target``."""
    return target.with_name(f"{target.name}.part")


def part_record_of(target: Path) -> Path:
    """The JSON record of an incomplete download; it is removed last."""
    return target.with_name(f"{target.name}.part.json")


def discard_download(target: Path) -> None:
    """Remove a download, complete or not, and its record."""
    for path in (target, part_of(target), part_record_of(target)):
        path.unlink(missing_ok=True)
