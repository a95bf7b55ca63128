"""The package's environment variables, the folder of its cache, and users' paths.

``setup.py`` imports this module, so it needs only Python's standard library.
"""

import os
from pathlib import Path
from typing import TypeAlias

from vitadapter_zoo.errors import ZooError

Home: TypeAlias = str | os.PathLike[str] | None

# More processes or threads than that are a mistake, and starting them takes the machine down.
MOST_PROCESSES = 1024
LARGEST_SEED = 2**63 - 1  # of torch's generators

# Bytes; the limits of Linux and of its usual file systems. Beyond them even the question whether a
# file exists is an error.
LONGEST_PATH, LONGEST_NAME = 4095, 255


def expanded(path: str | os.PathLike[str]) -> Path:
    """Expand a leading ``~`` or ``~user`` to that user's home folder.

    A shell leaves ``~`` in place in ``--out=~/x``, in quotes and in environment variables. Every
    path that a user can give passes through this function once, where it enters the package.

    Raises:
        ZooError: there is no such user, or no file can have that path: it is too long, or holds a
            null character or half of a surrogate pair.
    """
    text = os.fspath(path)
    if "\0" in text:
        raise ZooError(f"the path {text[:80]!r} holds a null character")
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError as error:
        raise ZooError(f"the path {text[:80]!r} holds a character that is not Unicode") from error
    if len(encoded) > LONGEST_PATH or max(map(len, encoded.split(b"/"))) > LONGEST_NAME:
        raise ZooError(
            f"the path that begins with {text[:80]!r} is too long: a file's name has at most "
            f"{LONGEST_NAME} bytes and a path {LONGEST_PATH:,}"
        )
    # Path.expanduser would drop the dot of "./~" and expand that too.
    result = os.path.expanduser(text)  # noqa: PTH111
    user, slash, _ = text.partition("/")
    if slash and result == text and user.startswith("~") and not Path(user).exists():
        raise ZooError(
            f"the path {text[:80]!r} begins with {user[:80]!r}, and there is no such user; write "
            "the home folder's full path"
        )
    return Path(result)


def home(cache_dir: Home = None) -> Path:
    """Return the cache folder: the argument, else ``$VITADAPTER_ZOO_HOME``, else the platform's."""
    chosen = cache_dir or os.environ.get("VITADAPTER_ZOO_HOME")
    if not chosen:
        import platformdirs

        chosen = platformdirs.user_cache_dir("vitadapter-zoo", appauthor=False)
    return expanded(chosen).resolve()


def is_offline(offline: bool | None = None) -> bool:
    """Return the argument, else whether ``VITADAPTER_ZOO_OFFLINE`` is 1, true, yes or on."""
    if offline is not None:
        return offline
    return os.environ.get("VITADAPTER_ZOO_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def operator() -> str:
    """Return the value of ``VITADAPTER_ZOO_OP``: ``compiled``, ``reference`` or empty.

    Raises:
        ZooError: the variable has another value.
    """
    wish = os.environ.get("VITADAPTER_ZOO_OP", "")
    if wish not in ("", "compiled", "reference"):
        raise ZooError(f"VITADAPTER_ZOO_OP is {wish!r}; it may be 'compiled' or 'reference'")
    return wish


def build_for_cuda() -> bool | None:
    """Return whether ``VITADAPTER_ZOO_CUDA`` requests a CUDA build; None if it is not set.

    Raises:
        ZooError: the variable is neither 0 nor 1.
    """
    wish = os.environ.get("VITADAPTER_ZOO_CUDA", "")
    if wish not in ("", "0", "1"):
        raise ZooError(f"VITADAPTER_ZOO_CUDA is {wish!r}; it may be 0 or 1")
    return wish == "1" if wish else None
