"""Paths that users give: home folders, and paths that no file can have."""

from pathlib import Path

import pytest

from vitadapter_zoo import ZooError, settings


def test_a_leading_tilde_is_the_users_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert settings.expanded("~/zoo") == Path("/somewhere/zoo")
    assert settings.expanded(Path("~/zoo")) == Path("/somewhere/zoo")
    assert settings.expanded("./~/zoo") == Path("~/zoo")
    assert settings.expanded("a/~b") == Path("a/~b")
    assert settings.expanded("~lock.jpg") == Path("~lock.jpg")


def test_the_cache_folder_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings.home("~/zoo") == tmp_path / "zoo"
    monkeypatch.setenv("VITADAPTER_ZOO_HOME", "~/other")
    assert settings.home() == tmp_path / "other"


@pytest.mark.parametrize(
    "path",
    ["~no-such-user-here/x", "a\0b", "x" * 256, "ß" * 128, "x/" * 2048, "9" * 5000, "a\ud800"],
)
def test_a_path_that_cannot_be_expanded_is_one_error(path: str) -> None:
    with pytest.raises(ZooError, match="the path"):
        settings.expanded(path)
