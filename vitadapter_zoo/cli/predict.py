"""``predict``: objects in pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vitadapter_zoo.catalog import get_row
from vitadapter_zoo.errors import ZooError

if TYPE_CHECKING:
    from vitadapter_zoo.detections import Detections


@click.command(
    epilog="""\b
Examples:
  vitadapter-zoo predict photo.jpg --model adapter-t-deit-3x
  vitadapter-zoo predict *.jpg --model adapter-l-augreg-3x --checkpoint weights.pth --json
""",
)
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--model", "name", required=True, metavar="NAME", help="Load name, see `list`.")
@click.option(
    "--checkpoint",
    metavar="SOURCE",
    help="A file, a URL or hf://user/repo[@revision][/file] instead of the published one.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("predictions"),
    show_default=True,
    help="Directory for the overlay pictures.",
)
@click.option("--json", "as_json", is_flag=True, help="Print COCO results as JSON on stdout.")
@click.option(
    "--score",
    type=click.FloatRange(0, 1),
    default=0.3,
    show_default=True,
    help="Lowest score that is drawn, printed and written.",
)
@click.option("--offline", is_flag=True, help="Never use the network.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
def predict(
    images: Sequence[str],
    name: str,
    checkpoint: str | None,
    out: Path,
    as_json: bool,
    score: float,
    device: str,
    offline: bool,
    quiet: bool,
) -> None:
    """Detect objects in IMAGE... and write pictures with what was found."""
    from vitadapter_zoo.images import read_image

    row = get_row(name)
    for image in images:
        read_image(image)  # a wrong picture is told before a long download
    from vitadapter_zoo.loader import load

    model = load(
        row.name,
        checkpoint=checkpoint,
        device=usable_device(device),
        offline=offline or None,
        progress=not quiet,
    )
    targets = _overlay_paths(images, out)
    results = []
    for index, (image, target) in enumerate(zip(images, targets, strict=True)):
        detections = model.predict(image, score_threshold=score)[0]
        _save_overlay(detections, image, target)
        if as_json:
            found = detections.to_coco(index)
            results.append({"image": image, "overlay": str(target), "detections": found})
        else:
            click.echo(f"{image}: {len(detections)} detections, drawn in {target}")
            for line in _by_class(detections):
                click.echo(f"  {line}")
    if as_json:
        click.echo(json.dumps(results))


def _by_class(detections: Detections) -> list[str]:
    """One line per class: how many, and the best score; the best class first."""
    scores: dict[str, list[float]] = {}
    for name, score in zip(detections.class_names, detections.scores.tolist(), strict=True):
        scores.setdefault(name, []).append(score)
    return [f"{len(found):4d} {name} (best score {found[0]:.2f})" for name, found in scores.items()]


def usable_device(name: str) -> Any:
    """The torch device of that name.

    Raises:
        ZooError: it is not here, or no device.
    """
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ZooError(f"the device {name!r} cannot be used here: {reason}") from error
    return device


def _overlay_paths(images: Sequence[str], out: Path) -> list[Path]:
    """One PNG per image; images of the same name in different folders get a number."""
    taken: set[Path] = set()
    paths = []
    for image in images:
        path = out / f"{Path(image).stem}.png"
        number = 2
        while path in taken:
            path = out / f"{Path(image).stem}-{number}.png"
            number += 1
        taken.add(path)
        paths.append(path)
    return paths


def _save_overlay(detections: Detections, image: str, target: Path) -> None:
    picture = detections.draw(image)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(target)
    except OSError as error:
        raise ZooError(f"cannot write {target}: {error.strerror or error}") from error
