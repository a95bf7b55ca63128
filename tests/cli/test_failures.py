"""How commands fail: exit statuses, one line on stderr, a traceback only on request."""

import subprocess
import sys
from pathlib import Path

import pytest
from forked import COMMAND, Done, run, workers

BROKEN = """
from vitadapter_zoo.{module} import {name} as broken
def fail(*arguments, **more):
    raise {error}
import vitadapter_zoo.{module}
vitadapter_zoo.{module}.{name} = fail
"""
PROGRAM = [sys.executable, "-m", "vitadapter_zoo.cli"]


def broken(module: str, name: str, error: str, *arguments: str) -> Done:
    """Run a command in a process in which one of its functions raises an unexpected error."""
    code = BROKEN.format(module=module, name=name, error=error) + COMMAND
    return workers().run(code, *arguments)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("train", "adapter-n-emoji", "--out", "x", "--lr", "nan"), "nan is not a finite number"),
        (("train", "adapter-n-emoji", "--out", "x", "--clip", "inf"), "inf is not a finite number"),
        (("train", "adapter-n-emoji", "--out", "x", "--workers", "1000000000"), "not in the range"),
        (("train", "adapter-n-emoji", "--out", "x", "--seed", "9" * 30), "not in the range"),
        (("verify", "adapter-n-emoji", "--max-minutes", "nan"), "nan is not a finite number"),
        (("verify", "adapter-n-emoji", "--workers", "1000000000"), "not in the range"),
        (("predict", "a.jpg", "--model", "x", "--score", "nan"), "nan is not a finite number"),
    ],
)
def test_numbers_that_are_none_or_absurd(arguments: tuple[str, ...], reason: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        ("TypeError('no such thing')", "TypeError: no such thing"),
        ("RecursionError()", "RecursionError"),
        ("MemoryError()", "MemoryError"),
        ("RuntimeError('a\\n\\nb\\x1b[2J' + 'x' * 10_000)", r"RuntimeError: a b\x1b[2Jxxx"),
        ("FileNotFoundError(2, 'No such file', 'lost.txt')", "lost.txt"),
        ("EOFError()", "EOFError"),
        ("BaseException('a panic in Rust')", "BaseException: a panic in Rust"),
        ("GeneratorExit()", "GeneratorExit"),
    ],
)
def test_an_unforeseen_error_is_one_line_and_status_2(
    error: str, shown: str, tmp_path: Path
) -> None:
    (tmp_path / "own.json").write_text("{}")
    for command in ("verify", "score"):
        arguments = ["--annotations", str(tmp_path / "own.json")]
        arguments += (
            ["vit-t-deit-3x"]
            if command == "verify"
            else [str(tmp_path / "own.json"), "--model", "vit-t-deit-3x"]
        )
        done = broken("evaluation.dataset", "read_dataset", error, command, *arguments)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert len(done.stderr) < 1000
        assert shown in done.stderr
        assert "--debug" in done.stderr


@pytest.mark.parametrize("end", ["1", "'a library gave up'", "True", "3"])
def test_a_library_that_ends_the_program_refutes_nothing(end: str, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text("{}")
    arguments = ("verify", "vit-t-deit-3x", "--annotations", str(tmp_path / "own.json"))
    done = broken("evaluation.dataset", "read_dataset", f"SystemExit({end})", *arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "a library ended the program" in done.stderr


LONG = "x" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", LONG],
        ["config", LONG],
        ["card", LONG],
        ["card", "vit-t-deit-3x", "--out", LONG],
        ["download", LONG],
        ["download", "vit-t-deit-3x", "--checkpoint", LONG],
        ["convert", LONG, "--model", "vit-t-deit-3x"],
        ["convert", __file__, "--model", "vit-t-deit-3x", "--out", LONG],
        ["predict", LONG, "--model", "vit-t-deit-3x"],
        ["predict", "9" * 5000, "--model", "vit-t-deit-3x"],
        ["predict", __file__, "--model", LONG],
        ["score", LONG, "--model", "adapter-n-emoji"],
        ["score", __file__, "--model", "adapter-n-emoji", "--report", LONG],
        ["verify", "adapter-n-emoji", "--annotations", LONG],
        ["verify", "adapter-n-emoji", "--annotations", "x.json", "--images", "9" * 300],
        ["verify", "adapter-n-emoji", "--coco", LONG],
        ["verify", "adapter-n-emoji", "--run", LONG],
        ["verify", LONG, "--annotations", __file__],
        ["train", "adapter-n-emoji", "--data", LONG, "--out", "out"],
        ["train", "adapter-n-emoji", "--data", ".", "--out", LONG],
        ["demo", "--out", LONG],
        ["info", f"user/{LONG}"],
        ["info", "user/a--b"],
        ["info", "user/a.git"],
    ],
    ids=lambda arguments: " ".join(part[:12] for part in arguments),
)
def test_a_path_or_name_that_nothing_can_have_is_one_line(
    arguments: list[str], tmp_path: Path
) -> None:
    done = run(*arguments, "--offline" if arguments[0] == "info" else "--debug", cwd=tmp_path)
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith("Error: ")
    assert "does not expect" not in error
    assert len(error) < 700


def test_a_file_that_may_not_be_used_is_named_without_a_call_for_a_report() -> None:
    """Errors that no code of ours expects also give the system's reason and advice."""
    for error, reason in (
        ("PermissionError(13, 'Permission denied', 'a\x1b[2Jb')", r"a\x1b[2Jb: Permission denied"),
        ("OSError(40, 'Too many levels of symbolic links', b'loop')", "loop: Too many levels"),
    ):
        done = broken("finder", "place_of", error, "info", "user/x")
        assert done.returncode == 2
        assert f"Error: cannot use {reason}" in done.stderr


def test_debug_prints_the_traceback(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text("{}")
    arguments = ("verify", "vit-t-deit-3x", "--annotations", str(tmp_path / "own.json"))
    for before, after in (([], ["--debug"]), (["--debug"], [])):
        done = broken(
            "evaluation.dataset", "read_dataset", "TypeError('x')", *before, *arguments, *after
        )
        assert done.returncode == 2
        assert "Traceback" in done.stderr
        assert "in fail" in done.stderr
        assert done.stderr.splitlines()[-1].startswith("Error: verify stopped on an error")


@pytest.mark.parametrize(
    "arguments",
    [
        ["list"],
        ["list", "--json"],
        ["info", "vit-t-deit-3x"],
        ["--help"],
        ["verify", "--help"],
        ["--version"],
        ["cache", "list"],
        ["env"],
    ],
)
def test_a_full_disk_on_stdout_is_one_line_and_status_2(arguments: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*PROGRAM, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "standard output: No space left on device" in done.stderr


@pytest.mark.parametrize("arguments", [["list"], ["list", "--json"], ["--help"]])
def test_a_reader_that_is_gone_is_no_error(arguments: list[str]) -> None:
    with subprocess.Popen(
        [*PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_stderr_that_is_full_changes_no_exit_status() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([*PROGRAM, "info", "vit-x"], stderr=full, check=False)
    assert done.returncode == 2
