"""The Space example builds the same page."""

import runpy
from pathlib import Path

SPACE = Path(__file__).parents[2] / "examples" / "space"


def test_app_builds_the_page() -> None:
    demo = runpy.run_path(str(SPACE / "app.py"))["demo"]
    config = demo.get_config_file()
    assert config["title"] == "vitadapter-zoo"
    kinds = {part["type"] for part in config["components"]}
    assert {"file", "slider", "dropdown", "downloadbutton", "html"} <= kinds
    assert (SPACE / "requirements.txt").read_text().strip() == "vitadapter-zoo[web]"
