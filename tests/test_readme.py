"""The README's Python blocks that need no published file: they run as they are printed."""

import inspect
import re
from pathlib import Path

import pytest
from forked import workers

import vitadapter_zoo

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
# What the blocks about operators take from their reader.
INPUTS = """
import torch
spatial_shapes = torch.tensor([[4, 6], [2, 3]])
value = torch.rand(1, 30, 2, 8)
sampling_locations = torch.rand(1, 5, 2, 2, 4, 2)
attention_weights = torch.rand(1, 5, 2, 2, 4)
reference_points = torch.rand(5, 2)
sampling_offsets = torch.rand(1, 5, 2, 2, 4, 2)
attention_logits = torch.rand(1, 5, 2, 2, 4)
probabilities, boxes = torch.rand(3, 28, 28), torch.tensor([[2.0, 3, 20, 30]] * 3)
height, width = 40, 50
"""


def test_blocks_about_operators_run() -> None:
    chosen = [block for block in BLOCKS if "vitadapter_zoo.ops" in block]
    assert len(chosen) == 3
    for block in chosen:
        done = workers().run(INPUTS + block)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_load_is_printed_with_its_arguments_and_defaults() -> None:
    (block,) = [block for block in BLOCKS if block.startswith("vitadapter_zoo.load(\n    name,")]
    printed = dict(re.findall(r"^    (\w+)=(.+),$", block, re.MULTILINE))
    parameters = inspect.signature(vitadapter_zoo.load).parameters
    defaults = {name: repr(it.default).replace("'", '"') for name, it in parameters.items()}
    assert printed == {name: text for name, text in defaults.items() if name != "name"}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[0][:40])
def test_every_block_is_python(block: str) -> None:
    compile(block, "README.md", "exec")
