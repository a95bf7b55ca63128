"""Untrusted text and JSON: escaped, shortened, and refused with one kind of error."""

from pathlib import Path

import pytest

from vitadapter_zoo import text


def test_foreign_text_is_escaped_and_shortened() -> None:
    assert text.shown("backbone.blocks.0.attn.qkv.weight") == "backbone.blocks.0.attn.qkv.weight"
    assert text.shown("a\x1b[2Jb\nc\r\u202ed\ud800") == r"a\x1b[2Jb\nc\r\u202ed\ud800"
    assert text.shown("Straße 日本") == "Straße 日本"
    assert len(text.shown("x" * 1_000_000)) == 80
    assert len(text.shown("\x1b" * 1_000_000)) < 400
    assert text.shown("a" * 90 + "tail", 30).endswith("tail")
    assert text.quoted("it") == "'it'"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        (b"\xff\xfe\xfa", "its text is not"),
        (b'{"a": "\xe9"}', "its text is not utf-8 at byte 7"),
        ("{,}", "line 1, column 2"),
        ("", "line 1, column 1"),
        ("1" * 5000, "a number in it cannot be read"),
    ],
)
def test_every_failure_of_json_is_one_error(content: str | bytes, reason: str) -> None:
    with pytest.raises(text.JSONError, match=reason) as caught:
        text.parse_json(content)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_in_every_unicode_encoding(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes('{"a": "ß"}'.encode(encoding))
    assert text.read_json(path, 1000) == {"a": "ß"}
    with pytest.raises(text.JSONError, match="at most 5"):
        text.read_json(path, 5)
    with pytest.raises(text.JSONError, match="No such file"):
        text.read_json(tmp_path / "none", 5)
