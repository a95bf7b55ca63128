"""What the tests of verifications share."""

from pathlib import Path

from click.testing import CliRunner, Result

from vitadapter_zoo import Verification
from vitadapter_zoo.cli import main
from vitadapter_zoo.evaluation.scoring import FIGURES

PICTURES = 6


def annotation_file(root: Path) -> Path:
    """The annotation file of a folder in COCO's layout."""
    return root / "annotations" / "instances_val2017.json"


def figures(found: Verification) -> list[float]:
    """The 12 figures of boxes, then those of masks."""
    return [scores.figures[name] for scores in (found.box, found.mask) for name in FIGURES]


def command(*arguments: str | float | Path) -> Result:
    """Run ``vitadapter-zoo`` in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])
