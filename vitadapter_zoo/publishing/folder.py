"""Read and check the configuration of a saved detector. Imports no torch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitadapter_zoo import timm_detector
from vitadapter_zoo.catalog import Row, get_row, list_models, timm_row
from vitadapter_zoo.errors import CheckpointError
from vitadapter_zoo.text import JSONError, number_in, range_error, read_json, shown
from vitadapter_zoo.weights import hub
from vitadapter_zoo.weights.progress import Report
from vitadapter_zoo.weights.shards import LONGEST_NAME, MOST_CLASSES
from vitadapter_zoo.weights.source import HubFile

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
NETWORK = "network"  # key of a detector around a timm model
LARGEST_CONFIG = 1 << 20  # bytes
DTYPES = ("float32", "float16", "bfloat16", "float64")
SIDES = (16, 8192)  # pixels
MEANS = (0.0, 255.0)
DEVIATIONS = (0.01, 10_000.0)
# Steps of the preparation that the network's input always has.
FIXED = {"do_resize": True, "do_rescale": False, "do_normalize": True}


@dataclass(frozen=True)
class Configuration:
    """The content of the two JSON files of a saved detector.

    Attributes:
        row: the catalog's row, with the input size, mean and deviation of the folder.
        categories: names of the classes, in the order of the outputs.
        dtype: name of the floating-point type of the weights.
    """

    row: Row
    categories: tuple[str, ...]
    dtype: str


def read_configuration(folder: Path) -> Configuration:
    """Read and check the configuration of a local folder in the Hub's form.

    Raises:
        CheckpointError: a file is missing or damaged, or a setting is out of its range; the
            message names the file, the setting, its value and its range.
    """
    config, prepared = _read(folder / CONFIG), _read(folder / PREPROCESSOR)
    where = shown(folder / CONFIG, 200)
    row = _row(config, where)
    dtype = config.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise range_error(where, "torch_dtype", dtype, "one of " + ", ".join(DTYPES),
                          CheckpointError)  # fmt: skip
    row = _prepared(row, prepared, shown(folder / PREPROCESSOR, 200))
    return Configuration(row, _categories(config.get("id2label"), where), dtype)


def _row(config: dict[str, Any], where: str) -> Row:
    """The row of the catalog that the settings name, or the row of the network they describe."""
    name = config.get("model")
    if NETWORK in config:
        row = timm_row(timm_detector.read(config[NETWORK], where, CheckpointError))
        if name != row.name:
            raise range_error(where, "model", name, f"{row.name!r}, the network's name",
                              CheckpointError)  # fmt: skip
        return row
    if not isinstance(name, str) or name not in list_models():
        raise range_error(where, "model", name, "a name of `vitadapter-zoo list`", CheckpointError)
    return get_row(name)


def fetch_configuration(source: HubFile, home: Path, report: Report, *, offline: bool) -> Path:
    """Download a published detector's configuration; return its folder in huggingface_hub's cache.

    Raises:
        DownloadError: absent, not allowed, unreachable, or with other hashes than announced.
    """
    for name in (CONFIG, PREPROCESSOR):
        config = hub.fetch(replace(source, file=name), home, report, offline=offline)
    return config.parent


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path, LARGEST_CONFIG)
        if not isinstance(content, dict):
            raise JSONError("it is not a JSON object")
    except JSONError as error:
        raise CheckpointError(
            f"{shown(path, 200)} cannot be read ({error}): the folder is not one that "
            "vitadapter_zoo.save_pretrained wrote"
        ) from error
    return content


def _prepared(row: Row, settings: dict[str, Any], where: str) -> Row:
    """Return the row with the image settings of the folder."""
    absent = [key for key in ("size", "image_mean", "image_std") if key not in settings]
    if absent:
        raise CheckpointError(f"{where} is not complete: {absent[0]!r} is missing")
    for key, value in FIXED.items():
        if settings.get(key, value) is not value:
            raise range_error(where, key, settings[key], str(value).lower(), CheckpointError)
    size = settings["size"]
    if not isinstance(size, dict):
        raise range_error(where, "size", size, "an object with longest_edge and shortest_edge",
                          CheckpointError)  # fmt: skip
    edges = [
        int(number_in(size, key, *SIDES, where=where, kind=CheckpointError, whole=True))
        for key in ("longest_edge", "shortest_edge")
    ]
    if edges[0] < edges[1]:
        raise range_error(where, "longest_edge", edges[0], f"at least shortest_edge, {edges[1]}",
                          CheckpointError)  # fmt: skip
    mean = _triple(settings, "image_mean", MEANS, where)
    std = _triple(settings, "image_std", DEVIATIONS, where)
    return replace(row, input_size=(edges[0], edges[1]), mean=mean, std=std)


def _triple(
    settings: dict[str, Any], key: str, limits: tuple[float, float], where: str
) -> tuple[float, float, float]:
    values = settings[key]
    if not isinstance(values, list) or len(values) != 3:
        raise range_error(where, key, values, "a list of three numbers", CheckpointError)
    names = [f"{key}[{index}]" for index in range(3)]
    named = dict(zip(names, values, strict=True))
    first, second, third = (
        number_in(named, name, *limits, where=where, kind=CheckpointError) for name in names
    )
    return first, second, third


def _categories(labels: object, where: str) -> tuple[str, ...]:
    """Return the class names, in the order of their numbers."""
    if not isinstance(labels, dict) or not 0 < len(labels) <= MOST_CLASSES:
        raise range_error(where, "id2label", labels,
                          f"an object of 1 to {MOST_CLASSES:,} numbered classes",
                          CheckpointError)  # fmt: skip
    names: list[str] = []
    seen: set[str] = set()
    for index in range(len(labels)):
        if str(index) not in labels:
            raise CheckpointError(
                f"{where}: id2label must number the classes from 0 to {len(labels) - 1}; "
                f"{index} is missing"
            )
        name = labels[str(index)]
        if not isinstance(name, str) or not name.strip() or len(name) > LONGEST_NAME:
            raise range_error(where, f"id2label[{index}]", name,
                              f"a text of 1 to {LONGEST_NAME} characters",
                              CheckpointError)  # fmt: skip
        if name in seen:
            raise range_error(where, f"id2label[{index}]", name, "a name of its own: another "
                              "class has it too", CheckpointError)  # fmt: skip
        seen.add(name)
        names.append(name)
    return tuple(names)
