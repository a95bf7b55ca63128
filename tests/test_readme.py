"""The README's Python blocks run as printed, with the detector in the package."""

import inspect
import re
import shutil
from pathlib import Path

import pytest
import standins

from vitadapter_zoo import list_models, load

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
MMDET = ("# needs mmdet", "# in an mmdet")  # `make test-mmdet` has what these need
RUNNABLE = [block for block in BLOCKS if not block.startswith(MMDET)]


def test_most_blocks_can_be_run() -> None:
    assert len(RUNNABLE) >= 7
    assert len(BLOCKS) - len(RUNNABLE) == 2


def test_load_is_printed_with_its_arguments_and_defaults() -> None:
    (block,) = [block for block in BLOCKS if block.startswith("vitadapter_zoo.load(\n")]
    printed = dict(re.findall(r"^    (\w+)=(.+),$", block, re.MULTILINE))
    parameters = inspect.signature(load).parameters
    defaults = {name: repr(it.default).replace("'", '"') for name, it in parameters.items()}
    assert printed == {name: text for name, text in defaults.items() if name != "name"}


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_every_block_is_python(block: str) -> None:
    compile(block, "README.md", "exec")


@pytest.mark.parametrize("block", RUNNABLE, ids=range(len(RUNNABLE)))
def test_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published weights would be downloaded, so the detector in the package stands for them."""
    for name in list_models():
        block = block.replace(f'"{name}"', '"adapter-n-emoji"')
    shutil.copy(standins.PHOTO, tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    exec("import vitadapter_zoo\n" + block, namespace)  # noqa: S102  our own text
