"""``export``: write a detector for another runtime, and compare the file with the detector."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from vitadapter_zoo._version import __version__
from vitadapter_zoo.backends.comparison import (
    Difference,
    Stages,
    detection_differences,
    native_stages,
    stage_differences,
)
from vitadapter_zoo.catalog import get_row
from vitadapter_zoo.detections import Detections
from vitadapter_zoo.detections.output_files import refuse_inputs
from vitadapter_zoo.errors import ConfigError, ZooError
from vitadapter_zoo.exporting import formats, postprocess
from vitadapter_zoo.exporting.detector import OUTPUTS, Exportable
from vitadapter_zoo.exporting.formats import FORMATS, PRECISIONS, SUFFIXES, Format
from vitadapter_zoo.images import PAD_MULTIPLE, ImageInput, NetworkInput, padded_side, read_image
from vitadapter_zoo.models import MaskRCNN
from vitadapter_zoo.models.mask_rcnn import SCORE_THRESHOLD
from vitadapter_zoo.settings import expanded
from vitadapter_zoo.text import PATH, shown
from vitadapter_zoo.weights import atomic

SMALLEST, LARGEST = 64, 4096  # pixels of a side
PICTURE = "000012.jpg"  # of the package's validation images
HALF_SCORE_LIMIT, HALF_OVERLAP_LIMIT = 0.02, 0.05  # weights in float16
HALF_UNMATCHED = 0.1  # share of the detections


@dataclass(frozen=True)
class Exported:
    """A file that `export` wrote.

    Attributes:
        path: the file; a JSON file of the same stem and ``postprocess.py`` lie beside it.
        size: (height, width) of its input in pixels.
        differences: to the detector, stage by stage. Detections, boxes, scores and masks are those
            of the file in its own runtime; the stages before them, which a file does not return,
            are those of the program that it was made from.
    """

    path: Path
    size: tuple[int, int]
    differences: tuple[Difference, ...]


def export(
    model: MaskRCNN,
    directory: str | os.PathLike[str],
    *,
    format: Format = "onnx",  # noqa: A002  the word that users expect
    sizes: Sequence[tuple[int, int]] | None = None,
    precision: Literal["float32", "float16"] = "float32",
    image: ImageInput | None = None,
    force: bool = False,
) -> list[Exported]:
    """Write a detector for another runtime: one file for each size.

    A file takes one image (`postprocess.prepare` makes the inputs) and returns boxes in network
    pixels, scores, labels and 28 x 28 mask probabilities of as many objects as it finds.
    ``postprocess.py``, which is written beside it and needs numpy only, turns them into detections.
    Each file is run on an image before it appears, and compared with the detector.

    Args:
        model: a detector in float32.
        directory: the folder to write to.
        format: ``"onnx"`` (standard operators only), ``"openvino"``, ``"pt2"`` (torch.export) or
            ``"aoti"`` (AOTInductor). The last two need this package where they are run.
        sizes: (height, width) of the inputs in pixels, multiples of 32 in 64..4096; by default
            that of a landscape image of the row's size.
        precision: ``"float16"`` stores the weights of an OpenVINO file in float16.
        image: for the comparison; by default one of the package's own. It is never replaced.
        force: replace the files of an earlier export, once the new ones are complete.

    Raises:
        ConfigError: an argument outside its range.
        ImageError: the image cannot be read.
        ZooError: a file is there and ``force`` is not given, a package is missing, the folder
            cannot be written to, the format's own tool fails, or the file computes something else
            than the detector. Nothing is written then.
    """
    wanted = list(sizes) if sizes is not None else [default_size(model)]
    _check(model, format, wanted, precision)
    formats.check_packages(format)
    pixels = read_image(_picture() if image is None else image)
    target = expanded(directory)
    _check_targets([target / name for name in _names(model, format, wanted)], image, force)
    with atomic.writing_to(target), _removed_on_failure(target):
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=target) as partial:
            found = [
                _export_one(model, Path(partial), format, size, precision, pixels)
                for size in wanted
            ]
            shutil.copy(postprocess.__file__, partial)
            for path in sorted(Path(partial).iterdir()):
                path.replace(target / path.name)
    return [replace(one, path=target / one.path.name) for one in found]


def _stem(model: MaskRCNN, size: tuple[int, int]) -> str:
    return f"{model.row.name}-{size[0]}x{size[1]}"


def _names(model: MaskRCNN, kind: Format, sizes: Sequence[tuple[int, int]]) -> list[str]:
    """The names of the files that an export writes."""
    endings = [SUFFIXES[kind], ".json", *([".bin"] if kind == "openvino" else [])]
    stems = [_stem(model, size) for size in sizes]
    return [*(stem + ending for stem in stems for ending in endings), _postprocess_name()]


def _postprocess_name() -> str:
    """The name of the copy of `postprocess` that lies beside the files."""
    return Path(postprocess.__file__).name


def _check_targets(targets: Sequence[Path], image: ImageInput | None, force: bool) -> None:
    """Refuse to write over an input, a folder, or a file that nobody allowed to replace.

    The copy of `postprocess` of another export is no obstacle.
    """
    refuse_inputs(targets, [image])
    own = Path(postprocess.__file__).read_bytes()
    for path in targets:
        if path.is_dir():
            raise ZooError(f"cannot write {shown(path, PATH)}: it is a folder")
        if force or not path.exists():
            continue
        if path.name != _postprocess_name() or path.read_bytes() != own:
            raise ZooError(
                f"{shown(path, PATH)} is there already: --force (force=True) replaces it, or "
                "choose another folder"
            )


@contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    """Remove the folder after an error, if it was not there before and holds nothing."""
    existed = folder.exists()
    try:
        yield
    except BaseException:
        if not existed and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise


def default_size(model: MaskRCNN) -> tuple[int, int]:
    """(height, width) of a landscape image's input, multiples of 32."""
    longest, shortest = model.row.input_size
    return padded_side(shortest), padded_side(longest)


def _picture() -> Path:
    files = get_row("adapter-n-emoji").data_files
    assert files is not None  # noqa: S101  the row has its data in the package
    return files[1] / PICTURE


def _check(model: MaskRCNN, kind: str, sizes: Sequence[tuple[int, int]], precision: str) -> None:
    if kind not in FORMATS:
        raise ConfigError(f"the format {shown(kind)!r} is none of {', '.join(FORMATS)}")
    if precision not in PRECISIONS[kind]:
        pairs = "; ".join(f"{name}: {', '.join(known)}" for name, known in PRECISIONS.items())
        raise ConfigError(f"{kind} has no precision {shown(precision)!r}; there are {pairs}")
    if not sizes:
        raise ConfigError("no size: give at least one (height, width)")
    for size in sizes:
        if any(side % PAD_MULTIPLE or not SMALLEST <= side <= LARGEST for side in size):
            raise ConfigError(
                f"the size {size[0]}x{size[1]} is outside the range: height and width are "
                f"multiples of {PAD_MULTIPLE} from {SMALLEST} to {LARGEST}"
            )
    weights = next(model.parameters())
    if weights.dtype != torch.float32 or weights.device.type != "cpu":
        raise ConfigError(
            f"the detector is in {str(weights.dtype)[6:]} on {weights.device}: load it with "
            'device="cpu" and dtype=torch.float32'
        )


def settings_of(model: MaskRCNN, size: tuple[int, int]) -> dict[str, Any]:
    """What a user of the file has to know, as plain data."""
    return {
        "model": model.row.name,
        "vitadapter_zoo": __version__,
        "license": model.row.license,
        "height": size[0],
        "width": size[1],
        "mean": list(model.row.mean),
        "std": list(model.row.std),
        "classes": list(model.categories),
        "outputs": list(OUTPUTS),
    }


def _export_one(
    model: MaskRCNN,
    folder: Path,
    kind: Format,
    size: tuple[int, int],
    precision: str,
    pixels: Any,
) -> Exported:
    settings = settings_of(model, size)
    stem = _stem(model, size)
    path = folder / f"{stem}{SUFFIXES[kind]}"
    prepared = postprocess.prepare(pixels, settings)
    example = [torch.from_numpy(value) for value in prepared.inputs(SCORE_THRESHOLD).values()]
    tensor = torch.from_numpy(prepared.image)
    given = NetworkInput(tensor, prepared.resized, prepared.original, prepared.scale)
    native = native_stages(model, given)

    def detector(stages: bool) -> Exportable:
        return Exportable(model, size, decomposed=formats.decomposes(kind), stages=stages)

    text, half = json.dumps(settings), precision == "float16"
    try:
        staged = formats.stages(kind, detector(True), example, path, text)
        formats.finish(kind, detector(False), example, path, text, half=half)
        outputs = formats.runner(kind, path)(prepared.inputs(SCORE_THRESHOLD))
    except (ZooError, OSError):
        raise
    except Exception as error:  # whatever the format's own tool raises
        reason = shown(str(error).partition("\n")[0], PATH)
        raise ZooError(
            f"{stem} cannot be exported to {kind}: {type(error).__name__}: {reason}"
        ) from error
    found = stage_differences(_with_stages(native, staged), native)
    detections = detection_differences(_detections(outputs, prepared, settings), native.detections)
    found += _for_half(detections, len(native.detections)) if half else detections
    wrong = [one for one in found if not one.agrees]
    if wrong:
        raise ZooError(
            f"{stem} in {kind} computes something else than the detector, first in "
            f"{wrong[0].stage} ({wrong[0].measured:.3g}, at most {wrong[0].limit:.3g}): nothing "
            "was written; please report it with the versions that `vitadapter-zoo env` shows"
        )
    (folder / f"{stem}.json").write_text(json.dumps(settings, indent=1) + "\n")
    return Exported(path, size, tuple(found))


def _for_half(found: list[Difference], count: int) -> list[Difference]:
    """The differences with the limits of weights in float16."""
    limits = {
        "detections": max(1.0, HALF_UNMATCHED * count),
        "scores": HALF_SCORE_LIMIT,
        "boxes": HALF_OVERLAP_LIMIT,
        "masks": HALF_OVERLAP_LIMIT,
    }
    return [replace(one, limit=limits[one.stage]) for one in found]


def _detections(
    outputs: formats.Arrays, prepared: postprocess.Prepared, settings: dict[str, Any]
) -> Detections:
    """The detections of a file, from its outputs."""
    found = postprocess.finish(outputs, prepared, settings)
    return Detections(
        torch.from_numpy(found.boxes),
        torch.from_numpy(found.scores),
        torch.from_numpy(found.labels).long(),
        torch.from_numpy(found.masks),
        categories=tuple(settings["classes"]),
    )


def _with_stages(native: Stages, outputs: formats.Arrays) -> Stages:
    """The detector's results with the stages of another program, which follow its `OUTPUTS`."""
    stages = [torch.from_numpy(output) for output in outputs[len(OUTPUTS) :]]
    maps = len(native.backbone)
    levels = maps + len(native.neck)
    return replace(
        native,
        backbone=stages[:maps],
        neck=stages[maps:levels],
        proposals=stages[levels],
        proposal_scores=stages[levels + 1],
    )
