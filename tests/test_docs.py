"""The site: its code blocks run as printed, its picture is up to date, every name is in the API."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import documents
import make_plot
import pytest
import standins
from docs_hook import missing

DOCS = documents.ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
NOTEBOOKS = sorted(path.name for path in (DOCS / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page run in order, in one folder with a photo."""
    shutil.copy(standins.PHOTO, tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "docs"}
    for block in documents.blocks(DOCS / page):
        if block.language == "python" and block.reason is None:
            documents.run_python(block.text, namespace)
        elif block.language == "python":
            compile(block.text, page, "exec")
        elif block.language == "sh":
            for words in documents.commands(block):
                if words[0] == documents.PROGRAM:
                    documents.check_options(words)
                if block.reason is None:
                    documents.run_command(words, tmp_path)
        else:
            assert block.language in ("", "text"), f"{page} has a block of {block.language}"


def test_most_blocks_are_run() -> None:
    all_blocks = [block for page in PAGES for block in documents.blocks(DOCS / page)]
    run = [block for block in all_blocks if block.reason is None and block.language]
    assert len(run) >= 20


def test_an_option_that_is_not_there_is_found() -> None:
    import click

    with pytest.raises(click.NoSuchOption):
        documents.check_options(["vitadapter-zoo", "predict", "a.jpg", "--sore", "0.5"])
    with pytest.raises(click.UsageError):
        documents.check_options(["vitadapter-zoo", "cache", "lists"])


def test_the_plot_is_that_of_the_catalog() -> None:
    """`make plot` draws it again."""
    assert (DOCS / "models.svg").read_text(encoding="utf-8") == make_plot.drawing()


def test_every_public_name_is_in_the_api() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    assert missing(page) == []
    assert missing(page.replace("::: vitadapter_zoo.load\n", "")) == ["load"]


def test_the_reliability_page_names_files_that_exist() -> None:
    page = (DOCS / "reliability.md").read_text(encoding="utf-8")
    for path in re.findall(r"`(tests/[\w/.]+)`", page):
        assert (documents.ROOT / path).exists(), path


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name: str, tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(DOCS / "notebooks" / name, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()


@pytest.mark.slow
def test_the_site_builds_and_a_broken_link_fails(tmp_path: Path) -> None:
    for folder in ("docs", "vitadapter_zoo", "scripts"):
        shutil.copytree(documents.ROOT / folder, tmp_path / folder)
    shutil.copy(documents.ROOT / "mkdocs.yml", tmp_path)
    command = [sys.executable, "-m", "mkdocs", "build"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(command, cwd=tmp_path, check=True, env=environment)
    page = (tmp_path / "build" / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert 'id="vitadapter_zoo.load"' in page
    faq = tmp_path / "docs" / "faq.md"
    faq.write_text(faq.read_text(encoding="utf-8") + "\n[gone](gone.md)\n", encoding="utf-8")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert "gone.md" in done.stderr
