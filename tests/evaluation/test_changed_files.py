"""Valid annotation and result files with one thing changed: one error, or pycocotools' figures.

A short run belongs to every test run; `make test-slow` tries 10,000 examples of each kind, and
``EXAMPLES=500 pytest -m slow tests/evaluation/test_changed_files.py`` 500.
"""

import copy
import json
import math
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from changed_files import (
    BASES,
    Files,
    as_bytes,
    changed_annotations,
    changed_results,
    changed_text,
)
from coco_oracle import evaluated
from hypothesis import HealthCheck, given, settings

from examples import MANY, SECONDS
from vitadapter_zoo import DatasetError
from vitadapter_zoo.evaluation import read_dataset, read_results
from vitadapter_zoo.evaluation.scoring import KINDS
from vitadapter_zoo.evaluation.verdict import judge
from vitadapter_zoo.training.annotations import read_coco
from vitadapter_zoo.training.data import described

GIGABYTES = 2  # of one example
LARGEST_FOR_PYCOCOTOOLS = 1e5  # pixels: its memory grows with the length of a polygon

QUICK = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
THOROUGH = settings(QUICK, max_examples=MANY, derandomize=False, database=None)


def check(annotations: bytes, results: bytes, folder: Path) -> None:
    """One error of one short line, or 24 figures: pycocotools' own, where that has any."""
    paths = folder / "annotations.json", folder / "results.json"
    for path, content in zip(paths, (annotations, results), strict=True):
        path.write_bytes(content)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
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
        assert time.process_time() - start < SECONDS
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


@QUICK
@given(changed_annotations())
def test_a_changed_annotation_file(tmp_path: Path, files: Files) -> None:
    check(*as_bytes(files), tmp_path)


def check_training(annotations: bytes, folder: Path) -> None:
    """Training reads the file, or says what is wrong with it in one error of one short line."""
    path = folder / "annotations.json"
    path.write_bytes(annotations)
    start = time.process_time()
    try:
        split = read_coco(path, folder)
    except DatasetError as error:
        message = str(error)
    else:
        message = described(split, "train")
    assert time.process_time() - start < SECONDS
    assert message.isprintable()
    assert len(message) < 1200


@QUICK
@given(changed_annotations())
def test_a_changed_annotation_file_for_training(tmp_path: Path, files: Files) -> None:
    check_training(as_bytes(files)[0], tmp_path)


@pytest.mark.slow
@THOROUGH
@given(changed_annotations())
def test_many_changed_annotation_files_for_training(tmp_path: Path, files: Files) -> None:
    check_training(as_bytes(files)[0], tmp_path)


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
def test_many_changed_annotation_files(tmp_path: Path, files: Files) -> None:
    check(*as_bytes(files), tmp_path)


@pytest.mark.slow
@THOROUGH
@given(changed_results())
def test_many_changed_result_files(tmp_path: Path, files: Files) -> None:
    check(*as_bytes(files), tmp_path)


@pytest.mark.slow
@THOROUGH
@given(changed_text())
def test_many_files_with_changed_bytes(tmp_path: Path, files: tuple[bytes, bytes]) -> None:
    check(*files, tmp_path)


def test_the_unchanged_files_are_scored(tmp_path: Path) -> None:
    for files in BASES:
        annotations, results = as_bytes(files)
        assert pycocotools(json.loads(annotations), json.loads(results)) is not None
        check(annotations, results, tmp_path)
