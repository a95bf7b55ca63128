"""Untrusted text and JSON: shown safely, and parsed with one kind of error."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitadapter_zoo.errors import ZooError

PATH = 300  # characters of a path or URL that a message keeps


def shown(text: object, limit: int = 80) -> str:
    r"""Prepare untrusted text for a message: on one line, escaped and shortened.

    Names of tensors, classes and files come from other people's files. Control characters, line
    breaks, terminal escapes, characters that change the direction of writing and lone surrogates
    are written as ``\x1b``, ``\n`` and so on; what is longer than ``limit`` characters is cut in
    the middle.

    Args:
        text: the text, or any object whose ``str`` is meant.
        limit: largest number of characters of the text that is kept, before escaping.
    """
    whole = str(text)
    if len(whole) > limit:
        head = max(1, limit * 2 // 3)
        tail = max(1, limit - head - 3)
        whole = f"{whole[:head]}...{whole[-tail:]}"
    return "".join(
        character
        if character.isprintable() and character != "\\"
        else character.encode("unicode_escape").decode("ascii")
        for character in whole
    )


def visible(text: str, limit: int = 2000) -> str:
    """Prepare untrusted text for a page: invisible characters are escaped.

    Unlike `shown` it keeps backslashes, so that a command line can be copied.

    Args:
        text: the text.
        limit: largest number of characters that is kept, before escaping.
    """
    if len(text) > limit:
        text = f"{text[: limit - 3]}..."
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def quoted(text: object, limit: int = 80) -> str:
    """``shown`` in single quotes."""
    return f"'{shown(text, limit)}'"


class JSONError(ValueError):
    """A text is not JSON; the message is one line that says where and why."""


def parse_json(content: str | bytes) -> Any:
    """Parse JSON; every failure is a ``JSONError``.

    Args:
        content: text, or bytes in UTF-8, UTF-16 or UTF-32 with or without a byte order mark.

    Raises:
        JSONError: a syntax error, nesting too deep for Python's parser, another encoding, or a
            number with more digits than Python converts.
    """
    try:
        if isinstance(content, bytes):
            content = content.decode(json.detect_encoding(content), "strict")
        return json.loads(content.removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        raise JSONError(
            f"not JSON at line {error.lineno}, column {error.colno}: {shown(error.msg)}"
        ) from error
    except RecursionError as error:
        raise JSONError("its JSON is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise JSONError(f"its text is not {error.encoding} at byte {error.start}") from error
    except ValueError as error:  # an integer of more than 4300 digits
        raise JSONError(f"a number in it cannot be read ({shown(error)})") from error


def read_json(path: Path, largest: int) -> Any:
    """Parse a JSON file; every failure to read or parse it is a ``JSONError``.

    Args:
        path: the file.
        largest: bytes; a larger file is refused before it is read.

    Raises:
        JSONError: the reason, without the file's name.
    """
    try:
        size = path.stat().st_size
        if size > largest:
            raise JSONError(f"it has {size:,} bytes, and at most {largest:,} are read")
        content = path.read_bytes()
    except OSError as error:
        raise JSONError(error.strerror or str(error)) from error
    return parse_json(content)


def number_in(
    settings: Mapping[str, Any],
    key: str,
    low: float,
    high: float,
    *,
    where: str,
    kind: type[ZooError],
    whole: bool = False,
) -> float:
    """Read a number from untrusted settings and check its range.

    Args:
        settings: parsed JSON.
        key: the number's name.
        low: smallest value.
        high: largest value.
        where: the file, for the message.
        kind: class of the error.
        whole: whether it must be an integer.

    Raises:
        ZooError: of the class ``kind``; the value is absent, no number, or out of range.
    """
    value: Any = settings.get(key)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = is_number and low <= value <= high
    if not fits or (whole and value != int(value)):
        raise range_error(where, key, value, f"{'an integer' if whole else 'a number'} from "
                          f"{low:g} to {high:g}", kind)  # fmt: skip
    return float(value)


def range_error(
    where: str, key: str, value: object, expected: str, kind: type[ZooError]
) -> ZooError:
    """Create the error for a setting that is out of its range."""
    return kind(f"{where}: {key} is {shown(repr_of(value))}; it must be {expected}")


def repr_of(value: object) -> str:
    """Return the start of a value as JSON-like text; nested values are abbreviated."""
    if isinstance(value, (dict, list, tuple)):
        kind = {dict: "an object", list: "a list", tuple: "a list"}[type(value)]
        return f"{kind} of {len(value)}"
    return repr(value)
