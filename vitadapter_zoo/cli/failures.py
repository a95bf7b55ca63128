"""How a command fails: one line on stderr and an exit status that scripts can rely on."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import click

from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.text import PATH, shown

COULD_NOT_RUN = 2  # 1 is a finding: `verify` refutes, `compare` sees a difference
INTERRUPTED = 128 + signal.SIGINT  # as shells report a process that a signal ended
READER_GONE = 128 + signal.SIGPIPE
# Of writing to a stream. Files are named in the error, or written by code that raises ZooError.
STREAM_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF, errno.EPIPE)
# Of opening what the user named; a file that is suddenly gone is a fault of our own.
PATH_ERRORS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS,
               errno.ENOTDIR, errno.EISDIR, errno.ENOSPC, errno.EDQUOT)  # fmt: skip
LONGEST_REASON = 500  # characters of another library's message that are shown

_DEBUG = "vitadapter_zoo.debug"  # key in click's context


class CommandFailure(click.ClickException):
    """An error that click prints as one line; the command could not do its work."""

    exit_code = COULD_NOT_RUN


def add_debug_option(command: click.Command) -> None:
    """Give a command, and every command of a group, the option ``--debug``."""

    def remember(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            context.meta[_DEBUG] = True

    option = click.Option(
        ["--debug"],
        is_flag=True,
        expose_value=False,
        callback=remember,
        help="Print the traceback of an error.",
    )
    command.params.append(option)
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            add_debug_option(inner)


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """While it is open, a warning is one line on stderr, without a line of code, shown once."""
    shown_before: set[str] = set()
    usual = warnings.showwarning

    def show_once(message: Warning | str, *_: object, **__: object) -> None:
        text = str(message)
        if text not in shown_before:
            shown_before.add(text)
            with contextlib.suppress(OSError):
                click.echo(f"Warning: {text}", err=True)

    warnings.showwarning = show_once
    try:
        yield
    finally:
        warnings.showwarning = usual


def failure(
    error: BaseException, context: click.Context
) -> click.ClickException | click.exceptions.Exit:
    """Convert an exception into the error to print; ``--debug`` prints the traceback first."""
    if context.meta.get(_DEBUG):
        traceback.print_exception(error)
    if isinstance(error, ZooError):
        return CommandFailure(str(error))
    if isinstance(error, OSError) and is_of_output(error):
        return output_failure(error)
    if isinstance(error, OSError) and error.filename and error.errno in PATH_ERRORS:
        place = shown(os.fsdecode(error.filename), PATH)
        return CommandFailure(f"cannot use {place}: {error.strerror}; choose another path")
    name = context.invoked_subcommand or context.info_name
    return CommandFailure(
        f"{name} stopped on an error that it does not expect ({describe(error)}); repeat the "
        "command with --debug for the traceback, and report it with the traceback"
    )


def is_of_output(error: OSError) -> bool:
    """Whether an error comes from printing."""
    return error.filename is None and error.errno in STREAM_ERRORS


def output_failure(error: OSError) -> click.ClickException | click.exceptions.Exit:
    """Convert a failure to print; it is silent if the reader closed the pipe."""
    if error.errno == errno.EPIPE:
        return click.exceptions.Exit(READER_GONE)
    return CommandFailure(
        f"cannot write to standard output: {error.strerror or error}; free some space, or send the "
        "output elsewhere"
    )


def describe(error: BaseException) -> str:
    """Return type and message of an exception on one line, without control characters."""
    text = " ".join(str(error).split())
    text = "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)
    if len(text) > LONGEST_REASON:
        text = f"{text[:LONGEST_REASON]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def status_of(end: SystemExit) -> int:
    """Return the exit status for a SystemExit, which our commands do not raise themselves.

    A library's own 1 does not mean that a checkpoint is refuted.
    """
    if isinstance(end.__context__, BrokenPipeError):  # rich exits with 1 then
        return READER_GONE
    if end.code in (None, 0):
        return 0
    reason = "" if isinstance(end.code, int) else f" ({describe(end)})"
    show(CommandFailure(f"a library ended the program{reason}"))
    return COULD_NOT_RUN


def finish_output(status: int) -> int:
    """Flush the output; return the exit status, which changes if flushing fails."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        # Python flushes standard output again when it exits, and would print a traceback then.
        with contextlib.suppress(OSError, ValueError), Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())
        if status not in (COULD_NOT_RUN, INTERRUPTED, READER_GONE):
            return status_after(output_failure(error))
    return status


def status_after(end: click.ClickException | click.exceptions.Exit) -> int:
    """Print the error, if any; return the exit status."""
    if isinstance(end, click.ClickException):
        show(end)
    return end.exit_code


def show(error: click.ClickException) -> None:
    """Print an error; if stderr cannot be written either, only the exit status tells."""
    with contextlib.suppress(OSError):
        error.show()
