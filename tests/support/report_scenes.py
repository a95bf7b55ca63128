"""A small evaluation to write reports of, and a parser of their pages."""

from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

from click.testing import CliRunner, Result

from vitadapter_zoo import MaskRCNN, cli
from vitadapter_zoo.evaluation.dataset import Dataset
from vitadapter_zoo.evaluation.run import ImageResult

NAME = "adapter-t-deit-3x"


@dataclass
class Page(HTMLParser):
    """What a page holds: addresses, values by id, and text by element."""

    addresses: list[str] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self.addresses += [
            value for name, value in attrs if name in ("src", "href", "srcset", "data") and value
        ]
        if tag == "data":
            self.values[found["id"] or ""] = float(found["value"] or "nan")

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


@dataclass(frozen=True)
class Scene:
    """A data set of three images with what the small detector finds in them."""

    root: Path
    data: Dataset
    model: MaskRCNN
    results: tuple[ImageResult, ...]


def as_found(scene: Scene) -> list[ImageResult]:
    """Detections that are the annotations themselves, each once, with sure scores."""
    results = []
    for image in scene.data.images:
        objects = [one for one in scene.data.objects if one.image_id == image.image_id]
        results.append(
            ImageResult(
                image_id=image.image_id,
                size=image.size,
                boxes=[one.box for one in objects],
                scores=[0.9] * len(objects),
                category_ids=[one.category_id for one in objects],
                masks=[one.mask.decode() for one in objects],
            )
        )
    return results


def without(result: ImageResult, count: int) -> ImageResult:
    """The result with the scores of the last ones too low to count."""
    kept = len(result.scores) - count
    return replace(result, scores=[0.9] * kept + [0.1] * count)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)
