"""Code blocks of the README and the site, and how they are run."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import click
from click.testing import CliRunner

from vitadapter_zoo import list_models
from vitadapter_zoo.cli import main

ROOT = Path(__file__).parents[2]
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n+)?"
    r"^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
PROGRAM = "vitadapter-zoo"
# A published checkpoint would be downloaded, so the detector in the package stands for it.
STAND_IN = "adapter-n-emoji"
GOOD = (0, 3)  # 3: a part of the images is inconclusive


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        language: ``python``, ``sh`` or empty.
        text: the code.
        reason: why the tests cannot run it; None where they do.
    """

    language: str
    text: str
    reason: str | None


def blocks(path: Path) -> list[Block]:
    """The code blocks of a Markdown file, in order."""
    return [
        Block(found["language"], found["text"], found["reason"])
        for found in FENCE.finditer(path.read_text(encoding="utf-8"))
    ]


def commands(block: Block) -> list[list[str]]:
    """The commands of a ``sh`` block as lists of words; redirections are left out."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.partition(" > ")[0], comments=True)
        if words:
            found.append(words)
    return found


def check_options(words: list[str]) -> None:
    """Raises where the program has no such command or option; files need not be there."""
    command: click.Command = main
    rest = words[1:]
    parent: click.Context | None = None
    while isinstance(command, click.Group) and rest:
        parent = click.Context(command, parent, info_name=PROGRAM)
        name, inner, rest = command.resolve_command(parent, rest)
        assert inner is not None, f"{PROGRAM} has no command {name}"
        command = inner
    try:
        command.make_context(command.name, list(rest), parent=parent)
    except (click.NoSuchOption, click.MissingParameter):
        raise
    except (click.BadParameter, click.exceptions.Exit):
        return  # a file of the example that is not there; --help


def run_command(words: list[str], folder: Path) -> None:
    """Run one command in this process; in ``folder``, which is the current one."""
    assert words[0] == PROGRAM, f"a block with {words[0]!r} needs a reason why it is not run"
    given: list[str] = []
    for word in words[1:]:
        if "*" in word and any(folder.glob(word)):  # as a shell does
            given += sorted(path.name for path in folder.glob(word))
        else:
            given.append(STAND_IN if word in list_models() else word)
    done = CliRunner().invoke(main, given)
    assert done.exit_code in GOOD, f"{shlex.join(words)}: {done.output}"


def run_python(text: str, namespace: dict[str, object]) -> None:
    """Run a block of Python; the stand-in takes the place of published models."""
    for name in list_models():
        text = text.replace(f'"{name}"', f'"{STAND_IN}"')
    exec(text, namespace)  # noqa: S102  our own text
