"""Hypothesis strategies: annotation and result files that are valid but for one change."""

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

from coco_oracle import random_data
from hypothesis import strategies as st

Files = tuple[dict[str, Any], list[dict[str, Any]]]


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


def as_bytes(files: Files) -> tuple[bytes, bytes]:
    """Both files as they lie on the disk."""
    return json.dumps(files[0]).encode(), json.dumps(files[1]).encode()
