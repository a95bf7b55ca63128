"""A saved detector whose settings were changed: one error that names file, key, value and range."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from vitadapter_zoo import CheckpointError
from vitadapter_zoo.publishing.folder import read_configuration

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"


@pytest.fixture
def configured(folder: Path, tmp_path: Path) -> Path:
    """The two JSON files of a saved detector."""
    for name in (CONFIG, PREPROCESSOR):
        shutil.copy(folder / name, tmp_path / name)
    return tmp_path


def change(folder: Path, file: str, path: list[str | int], text: str) -> None:
    """Write ``text`` as the value of one setting, whatever JSON it is."""
    content = json.loads((folder / file).read_text())
    place: Any = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = "@HERE@"
    (folder / file).write_text(json.dumps(content).replace('"@HERE@"', text))


def refused(folder: Path, file: str, key: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_configuration(folder)
    message = str(caught.value)
    assert file in message
    assert key in message
    assert len(message) < 600
    assert message.isprintable()
    return message


@pytest.mark.parametrize("edge", ["longest_edge", "shortest_edge"])
@pytest.mark.parametrize(
    "value", ["1e400", "10000000", "0", "-5", "true", "NaN", "null", '"800"', "[800]", "64.5",
              "9" * 4000, "{}"],
)  # fmt: skip
def test_sizes_have_a_range(edge: str, value: str, configured: Path) -> None:
    change(configured, PREPROCESSOR, ["size", edge], value)
    assert "16 to 8192" in refused(configured, PREPROCESSOR, edge)


@pytest.mark.parametrize("value", ["0", "-1", "1e-300", "NaN", "1e400", "true", "null", '"5"'])
def test_deviations_have_a_range(value: str, configured: Path) -> None:
    change(configured, PREPROCESSOR, ["image_std", 1], value)
    assert "0.01 to 10000" in refused(configured, PREPROCESSOR, "image_std[1]")


@pytest.mark.parametrize("value", ["NaN", "1e38", "-1", "null", "[]"])
def test_means_have_a_range(value: str, configured: Path) -> None:
    change(configured, PREPROCESSOR, ["image_mean", 2], value)
    assert "0 to 255" in refused(configured, PREPROCESSOR, "image_mean[2]")


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        (PREPROCESSOR, "image_mean", "[1, 2]"),
        (PREPROCESSOR, "image_std", '"abc"'),
        (PREPROCESSOR, "size", "[64, 40]"),
        (PREPROCESSOR, "do_normalize", "false"),
        (PREPROCESSOR, "do_rescale", "true"),
        (CONFIG, "model", '"\\u001b[2Jno-model"'),
        (CONFIG, "model", "[1]"),
        (CONFIG, "torch_dtype", '"int8"'),
        (CONFIG, "torch_dtype", '"complex64"'),
        (CONFIG, "torch_dtype", '"float8_e4m3fn"'),
        (CONFIG, "torch_dtype", '["float32"]'),
        (CONFIG, "torch_dtype", '"load"'),
        (CONFIG, "torch_dtype", "3"),
        (CONFIG, "id2label", "null"),
        (CONFIG, "id2label", "{}"),
        (CONFIG, "id2label", '["a"]'),
        (CONFIG, "id2label", '{"0": "a", "2": "b"}'),
        (CONFIG, "id2label[1]", '{"0": "a", "1": null}'),
        (CONFIG, "id2label[0]", '{"0": " ", "1": "b"}'),
        (CONFIG, "id2label[1]", '{"0": "a", "1": "a"}'),
        (CONFIG, "id2label[0]", '{"0": "' + "n" * 900_000 + '"}'),
    ],
)
def test_other_settings_are_checked(file: str, key: str, value: str, configured: Path) -> None:
    change(configured, file, [key.partition("[")[0]], value)
    refused(configured, file, key)


def test_the_longest_edge_is_not_shorter_than_the_shortest(configured: Path) -> None:
    change(configured, PREPROCESSOR, ["size", "longest_edge"], "39")
    assert "at least shortest_edge, 40" in refused(configured, PREPROCESSOR, "longest_edge")


@pytest.mark.parametrize("file", [CONFIG, PREPROCESSOR])
@pytest.mark.parametrize(
    "content", [b"[" * 50_000, b'{"a":' * 50_000, b"[1]", b"\xff\xfe", b"", b"{} " * (1 << 20)]
)
def test_files_that_are_no_json_object_are_one_error(
    file: str, content: bytes, configured: Path
) -> None:
    (configured / file).write_bytes(content)
    assert "cannot be read" in refused(configured, file, "save_pretrained wrote")


def test_a_good_folder_is_read(configured: Path) -> None:
    read = read_configuration(configured)
    assert (read.row.input_size, len(read.categories), read.dtype) == ((64, 40), 80, "float32")
