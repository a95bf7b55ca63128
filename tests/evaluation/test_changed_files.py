"""Valid annotation and result files with one thing changed: one error, or pycocotools' figures.

A short run belongs to every test run; `make test-slow` tries 10,000 examples of each kind.
"""

import copy
import json
import math
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_oracle import evaluated, random_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vitadapter_zoo import DatasetError
from vitadapter_zoo.evaluation import read_dataset, read_results
from vitadapter_zoo.evaluation.scoring import KINDS
from vitadapter_zoo.evaluation.verdict import judge

Files = tuple[dict[str, Any], list[dict[str, Any]]]

SECONDS, GIGABYTES = 10, 2  # of one example
LARGEST_FOR_PYCOCOTOOLS = 1e5  # pixels: its memory grows with the length of a polygon

QUICK = settings(
    max_examples=60,
    deadline=1000 * SECONDS,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
THOROUGH = settings(QUICK, max_examples=10_000, derandomize=False, database=None)


def base(seed: int) -> Files:
    """Four images with masks in all three forms, and what was found in them."""
    content, results = random_data(seed, images=4, classes=3)
    sizes = {one["id"]: (one["height"], one["width"]) for one in content["images"]}
    for place, entry in enumerate(content["annotations"]):
        x, y, w, h = entry["bbox"]
        height, width = sizes[entry["image_id"]]
        if place % 3 == 0:
            entry["segmentation"] = [
                [x, y, x + w, y, x + w / 2, y + h + 0.5],
                [x - 9, y, x + 5, y, x + 5, y + 5, x - 9, y + 7],
            ]
        elif place % 3 == 1:
            first = min(int(x) * height + int(y), height * width - 40)
            counts = [first, 40, height * width - first - 40]
            entry["segmentation"] = {"size": [height, width], "counts": counts}
    return content, [one for result in results for one in result.to_coco()]


BASES = [base(seed) for seed in range(40, 48)]

ODD_VALUES: st.SearchStrategy[Any] = st.sampled_from(
    [
        None, True, False, 0, -1, 1, 2, 3.0, 0.5, -0.0, 1e-300, 1e308, -1e308, 1e9, 1e5, -30.5,
        float("nan"), float("inf"), -float("inf"), 2**31, 2**53 + 1, 2**64, -(2**70), 10**400,
        "", "0", "1", "a", "-1", "\x00", "\ud800", "\x1b[2J", "é" * 3, "9" * 5000, "z" * 2000,
        [], [[]], [None], [1], [1, 2], [[1, 2]], [[1, 2, 3, 4]], [1, 2, 3, 4, 5, 6],
        [[1, 2, 30, 4, 5, 60]], [[1, 2, 30, 4, 5, 60], []], {}, {"counts": "0"},
        {"size": [40, 40], "counts": [1600]}, {"size": [2**31, 2**31], "counts": "1"},
    ]
)  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON value with each of its keys or indices."""
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def change_one_thing(draw: st.DrawFn, root: Any) -> None:
    """Change one value, key or entry of a JSON structure in place."""
    by_kind: dict[tuple[Any, ...], list[tuple[Any, Any]]] = {}
    for container, key in places(root):
        kind = (isinstance(container, dict), key if isinstance(container, dict) else "entry",
                type(container[key]))  # fmt: skip
        by_kind.setdefault(kind, []).append((container, key))
    # First the kind, so that the many coordinates do not take all the turns.
    kinds = sorted(by_kind, key=repr)
    container, key = draw(st.sampled_from(by_kind[draw(st.sampled_from(kinds))]))
    value = container[key]
    ways = ["replace", "remove"]
    if isinstance(container, list):
        ways += ["repeat", "insert"]
    if isinstance(value, (int, float)):
        ways += ["text", "float", "negate", "scale"]
    if isinstance(value, str):
        ways += ["cut", "append", "one character"]
    if isinstance(value, (dict, list)):
        ways += ["wrap", "empty"]
    way = draw(st.sampled_from(ways))
    if way == "remove":
        del container[key]
    elif way in ("repeat", "insert"):
        container.insert(key, copy.deepcopy(value) if way == "repeat" else draw(ODD_VALUES))
    else:
        changes: dict[str, Callable[[], Any]] = {
            "replace": lambda: draw(ODD_VALUES),
            "text": lambda: str(value),
            "float": lambda: float(value),
            "negate": lambda: -value,
            "scale": lambda: value * draw(st.sampled_from([0, 0.01, 2, 1000, 1e10])),
            "cut": lambda: value[: draw(st.integers(0, max(0, len(value) - 1)))],
            "append": lambda: value + draw(st.characters()),
            "one character": lambda: draw(st.characters()) + value[1:],
            "wrap": lambda: [value],
            "empty": type(value),
        }
        container[key] = changes[way]()


@st.composite
def changed_annotations(draw: st.DrawFn) -> Files:
    content, found = copy.deepcopy(draw(st.sampled_from(BASES)))
    change_one_thing(draw, content)
    return content, found


@st.composite
def changed_results(draw: st.DrawFn) -> Files:
    content, found = copy.deepcopy(draw(st.sampled_from([one for one in BASES if one[1]])))
    change_one_thing(draw, found)
    return content, found


@st.composite
def changed_text(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Both files as bytes, one of them changed without regard to its structure."""
    files = [json.dumps(file).encode() for file in draw(st.sampled_from(BASES))]
    which = draw(st.integers(0, 1))
    text = files[which]
    start = draw(st.integers(0, len(text)))
    end = min(len(text), start + draw(st.integers(0, 20)))
    way = draw(st.sampled_from(["cut", "replace", "repeat", "encode"]))
    if way == "cut":
        text = text[:start]
    elif way == "replace":
        text = text[:start] + draw(st.binary(max_size=4)) + text[end:]
    elif way == "repeat":
        text = text[:end] + text[start:]
    else:
        codec = draw(st.sampled_from(["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-7"]))
        text = text.decode().encode(codec)
    files[which] = text
    return files[0], files[1]


def check(annotations: bytes, results: bytes, folder: Path) -> None:
    """One error of one short line, or 24 figures: pycocotools' own, where that has any."""
    paths = folder / "annotations.json", folder / "results.json"
    for path, content in zip(paths, (annotations, results), strict=True):
        path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        data = read_dataset(paths[0], folder)
        found = judge("model", data, read_results(paths[1], data), (50.0, 50.0))
    except DatasetError as error:
        message = str(error)
        assert message.isprintable()
        assert len(message) < 800
        return
    finally:
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < GIGABYTES << 20  # in KiB
    ours = [*found.box.figures.values(), *found.mask.figures.values()]
    assert all(-1 <= value <= 1 for value in ours)
    theirs = pycocotools(json.loads(annotations), json.loads(results))
    if theirs is not None:
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


def pycocotools(content: dict[str, Any], found: list[dict[str, Any]]) -> list[float] | None:
    """The figures of pycocotools; None where it raises, or would take all memory."""
    for number, entry in enumerate(content["annotations"], start=1):
        entry["id"] = number  # it takes the object of id 0 for none, and wants numbers
        polygons = entry["segmentation"] if isinstance(entry["segmentation"], list) else []
        if any(abs(x) > LARGEST_FOR_PYCOCOTOOLS for polygon in polygons for x in polygon):
            return None
    figures: list[float] = []
    for kind in KINDS:
        try:
            stats = evaluated(copy.deepcopy(content), copy.deepcopy(found), kind).stats
        except Exception:  # whatever it raises: then it has no figures to compare
            return None
        figures += [float(value) for value in stats]
    return None if any(math.isnan(value) for value in figures) else figures


def as_bytes(files: Files) -> tuple[bytes, bytes]:
    return json.dumps(files[0]).encode(), json.dumps(files[1]).encode()


@QUICK
@given(changed_annotations())
def test_a_changed_annotation_file(tmp_path: Path, files: Files) -> None:
    check(*as_bytes(files), tmp_path)


@QUICK
@given(changed_results())
def test_a_changed_result_file(tmp_path: Path, files: Files) -> None:
    check(*as_bytes(files), tmp_path)


@QUICK
@given(changed_text())
def test_files_with_changed_bytes(tmp_path: Path, files: tuple[bytes, bytes]) -> None:
    check(*files, tmp_path)


@pytest.mark.slow
@THOROUGH
@given(changed_annotations())
def test_ten_thousand_changed_annotation_files(tmp_path: Path, files: Files) -> None:
    check(*as_bytes(files), tmp_path)


@pytest.mark.slow
@THOROUGH
@given(changed_results())
def test_ten_thousand_changed_result_files(tmp_path: Path, files: Files) -> None:
    check(*as_bytes(files), tmp_path)


@pytest.mark.slow
@THOROUGH
@given(changed_text())
def test_ten_thousand_files_with_changed_bytes(tmp_path: Path, files: tuple[bytes, bytes]) -> None:
    check(*files, tmp_path)


def test_the_unchanged_files_are_scored(tmp_path: Path) -> None:
    for files in BASES:
        annotations, results = as_bytes(files)
        assert pycocotools(json.loads(annotations), json.loads(results)) is not None
        check(annotations, results, tmp_path)
