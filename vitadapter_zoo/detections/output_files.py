"""Output files of the commands: an input is never overwritten, no file is left half-written."""

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from vitadapter_zoo import settings
from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.text import PATH, shown


def checked(path: str | os.PathLike[str], inputs: Iterable[Any]) -> Path:
    """The path, with ``~`` expanded, where something may be written.

    Args:
        path: of the file to write.
        inputs: what was read; those that are paths are compared with it.

    Raises:
        ZooError: it is a folder, or one of the inputs under any name (a link, other letter case).
    """
    target = settings.expanded(path)
    if target.is_dir():
        raise ZooError(f"cannot write {shown(target, PATH)}: it is a folder")
    refuse_inputs([target], inputs)
    return target


def refuse_inputs(targets: Iterable[Path], inputs: Iterable[Any]) -> None:
    """Refuse to write over an input.

    Args:
        targets: the files to write.
        inputs: what is read; those that are paths are compared with each target.

    Raises:
        ZooError: one of them is an input under any name (a link, other letter case).
    """
    given = [one for one in inputs if isinstance(one, (str, os.PathLike))]
    for target in targets:
        for one in given:
            if same_file(target, one):
                raise ZooError(
                    f"{shown(target, PATH)} is the input {shown(one, PATH)}, which is never "
                    "replaced; choose another name for the output"
                )


def same_file(one: Path, other: str | os.PathLike[str]) -> bool:
    """Whether writing ``one`` would replace ``other``, whatever the two are called.

    Links are followed, hard links recognised. Names that differ in letter case only count as the
    same, because on many file systems they are.
    """
    if os.fspath(other).startswith(("http://", "https://")):
        return False
    second = settings.expanded(other)
    try:
        if one.samefile(second):
            return True
    except OSError:  # one of them does not exist
        pass
    return key(one) == key(second)


def key(path: Path) -> str:
    """The same text for all paths that may name one file."""
    return unicodedata.normalize("NFC", os.path.realpath(path)).casefold()


def free_name(wanted: Path, taken: set[str], inputs: Iterable[Any]) -> Path:
    """``wanted``, or with a number in its name where an input or another output has that name.

    Args:
        wanted: the path; its folder need not exist.
        taken: the `key` of each output so far; the new one is added.
        inputs: what is read; those that are paths are avoided.
    """
    inputs = [given for given in inputs if isinstance(given, (str, os.PathLike))]
    path, number = wanted, 2
    while key(path) in taken or any(same_file(path, given) for given in inputs):
        path = wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}")
        number += 1
    taken.add(key(path))
    return path


def write(target: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        ZooError: the system refuses.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ZooError(
            f"cannot write {shown(target, PATH)}: {error.strerror or error}; choose another place"
        ) from error


def write_picture(target: Path, picture: Image.Image) -> None:
    """Write a picture in the format of the name's ending.

    Raises:
        ZooError: there is no such format, or the system refuses.
    """
    import io

    form = Image.registered_extensions().get(target.suffix.lower())
    if form is None or form not in Image.SAVE:
        raise ZooError(
            f"cannot write {shown(target, PATH)}: no picture format ends in {target.suffix!r}; "
            "take .png or .jpg"
        )
    buffer = io.BytesIO()
    picture.save(buffer, form)
    write(target, buffer.getvalue())
