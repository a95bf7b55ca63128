"""Ids of images, annotations and categories: names, whole numbers or text, compared exactly."""

from __future__ import annotations

import re
from typing import Any, TypeAlias

Id: TypeAlias = int | str

_NUMBER = re.compile(r"-?\d{1,4000}")  # Python refuses to convert longer text
_DIGITS = re.compile(r"(\d{1,4000})")


def read(value: Any) -> Id | None:
    """Convert a JSON value to an id; None if it cannot be one.

    A float without a fraction counts as the integer, because some writers have only floats.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, str):
        return value if is_unicode(value) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def order(key: Id) -> tuple[Any, ...]:
    """Sort key: numbers by value, then texts, in which digits are also compared by value.

    The order decides between detections of equal scores, so that it has to be that of
    pycocotools for numbers, and the same for the same numbers written as text.
    """
    if isinstance(key, int):
        return (0, key)
    if _NUMBER.fullmatch(key):
        return (1, int(key), key)
    parts = _DIGITS.split(key)
    # str.isdigit also takes characters that int refuses, a superscript two for instance.
    return (2, [(int(part), "") if _DIGITS.fullmatch(part) else (-1, part) for part in parts], key)


def is_unicode(text: str) -> bool:
    """Whether a text can be written to a file: JSON may hold half of a surrogate pair."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
