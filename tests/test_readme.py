"""The README's code runs as printed, and the site prints the arguments of `load` as they are."""

import inspect
import re
import shutil
from pathlib import Path

import documents
import pytest
import standins

from vitadapter_zoo import get_row, list_models, load

README = documents.ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = [block for block in documents.blocks(README) if block.language == "python"]


def test_load_is_printed_with_its_arguments_and_defaults() -> None:
    blocks = documents.blocks(documents.ROOT / "docs" / "load.md")
    (block,) = [block.text for block in blocks if "vitadapter_zoo.load(\n" in block.text]
    printed = dict(re.findall(r"^    (\w+)=(.+),$", block, re.MULTILINE))
    parameters = inspect.signature(load).parameters
    defaults = {name: repr(it.default).replace("'", '"') for name, it in parameters.items()}
    assert printed == {name: text for name, text in defaults.items() if name != "name"}


def test_the_table_is_the_catalog() -> None:
    printed = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| ([\d.]+) \| (\d+)M \|$", TEXT, re.MULTILINE)
    rows = [row for row in map(get_row, list_models()) if not row.made_here]
    assert sorted(printed) == sorted(
        (row.name, str(row.box_ap), str(row.mask_ap), str(row.parameters)) for row in rows
    )


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\(((?!http)[^)#]+)", TEXT):
        assert (documents.ROOT / target).is_file(), target


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block_runs(
    block: documents.Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The detector in the package replaces the published weights, which would be downloaded."""
    assert block.reason is None
    shutil.copy(standins.PHOTO, tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    documents.run_python(block.text, {"__name__": "readme"})
    assert (tmp_path / "overlay.png").is_file()


def test_commands_have_the_options_that_are_printed() -> None:
    shell = [block for block in documents.blocks(README) if block.language == "sh"]
    lines = [words for block in shell for words in documents.commands(block)]
    own = [words for words in lines if words[0] == documents.PROGRAM]
    assert len(own) >= 5
    for words in own:
        documents.check_options(words)
