"""The Hub, through huggingface_hub itself: each user is a process with HF_ENDPOINT set."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
import standhub

NAME = "adapter-t-deit-3x"
FILE = "mask_rcnn_deit_adapter_tiny_fpn_3x_coco.pth.tar"
PRELUDE = f"import sys, vitadapter_zoo as zoo, helpers, standins\nNAME = {NAME!r}\n"


@dataclass(frozen=True)
class Hub:
    url: str
    environment: dict[str, str]

    def add(self, name: str, data: bytes) -> None:
        requests.put(f"{self.url}/__add__/{name}", data=data, timeout=10).raise_for_status()

    def damage(self, name: str) -> None:
        requests.put(f"{self.url}/__damage__/{name}", timeout=10).raise_for_status()

    def log(self) -> list[str]:
        lines: list[str] = requests.get(f"{self.url}/__log__", timeout=10).json()
        return lines

    def run(self, code: str, **environment: str) -> str:
        """Run code as a user would; its output, or the error that it ended with."""
        body = "\n".join(f"    {line}" for line in code.strip().splitlines())
        script = f"{PRELUDE}try:\n{body}\nexcept zoo.ZooError as error:\n    print('ERROR', error)"
        result = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            env={**self.environment, **environment},
        )
        assert result.returncode == 0, result.stderr
        return result.stdout


@pytest.fixture
def hub(tmp_path: Path, zoo_home: Path) -> Iterator[Hub]:
    process = subprocess.Popen(
        [sys.executable, standhub.__file__], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    url = process.stdout.readline().strip()
    yield Hub(
        url,
        {
            **os.environ,
            "HF_ENDPOINT": url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_TOKEN": "hf_standin",
            "HF_HUB_DISABLE_XET": "1",  # the stand-in does not speak the Hub's newer protocol
            "VITADAPTER_ZOO_HOME": str(zoo_home),
            "PYTHONPATH": str(Path(__file__).parent),
        },
    )
    process.kill()
    process.wait()


SAME = "print(helpers.same_weights(zoo.load(NAME, checkpoint='{}'), NAME))"


def test_every_name_of_a_hub_file_loads(hub: Hub, published_file: Callable[[str], Path]) -> None:
    hub.add(FILE, published_file(NAME).read_bytes())
    hub.add("other.pth", b"not this one")
    names = [
        f"hf://{standhub.REPO}/{FILE}",
        f"hf://{standhub.REPO}@main/{FILE}",
        standhub.REPO,
        f"{hub.url}/{standhub.REPO}/resolve/main/{FILE}",
    ]
    assert hub.run("\n".join(SAME.format(name) for name in names)) == "True\n" * 4
    fetched = [line for line in hub.log() if line.startswith("GET") and FILE in line]
    assert len(fetched) == 1
    before = len(hub.log())
    again = SAME.format(names[0])
    assert hub.run(again, VITADAPTER_ZOO_OFFLINE="1") == "True\n"
    assert hub.run(again, HF_HUB_OFFLINE="1") == "True\n"
    assert len(hub.log()) == before + 1  # the log's own request
    hub.add(FILE, published_file("vit-t-deit-3x").read_bytes())
    assert "The file fits vit-t-deit-3x" in hub.run(again)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf://user/none/x.pth", "no such repository"),
        (f"hf://{standhub.REPO}/none.pth", "no such file"),
        (f"hf://{standhub.REPO}@v9/{FILE}", "no branch, tag or commit 'v9'"),
        (standhub.REPO, "name one as hf://user/repo/FILE"),
        ("hf://nonsense", "names no file on the Hub"),
    ],
)
def test_what_is_not_there_is_said(hub: Hub, name: str, message: str) -> None:
    output = hub.run(f"zoo.load(NAME, checkpoint={name!r})")
    assert message in output
    assert output.count("ERROR") == 1


def test_offline_says_what_is_missing(hub: Hub) -> None:
    output = hub.run(f"zoo.load(NAME, checkpoint='hf://{standhub.REPO}/{FILE}', offline=True)")
    assert "offline mode" in output
    assert hub.log() == ["GET /__log__"]


def test_a_file_that_differs_from_its_announced_hash_is_refused(
    hub: Hub, published_file: Callable[[str], Path], zoo_home: Path
) -> None:
    hub.add(FILE, published_file(NAME).read_bytes())
    hub.damage(FILE)
    output = hub.run(f"zoo.load(NAME, checkpoint='hf://{standhub.REPO}/{FILE}')")
    assert "is not the file that the server announces" in output
    assert not list(zoo_home.rglob("*.safetensors"))


def test_publishing_and_reading_back(hub: Hub, published_file: Callable[[str], Path]) -> None:
    source = str(published_file(NAME))
    code = f"""
model = zoo.load(NAME, checkpoint={source!r})
model.categories = tuple(f"thing {{i}}" for i in range(80))
print(zoo.push_to_hub(model, "user/repo"))
for name in ("user/repo", "hf://user/repo@main"):
    back = zoo.load(name)
    print(helpers.same_weights(back, NAME), back.categories[79], back.row == model.row)
print(helpers.same_weights(zoo.load(NAME, checkpoint="user/repo"), NAME))
"""
    output = hub.run(code).splitlines()
    assert output[0].startswith(f"{hub.url}/user/repo/commit/")
    assert output[1:] == ["True thing 79 True"] * 2 + ["True"]
    read = "print(helpers.same_weights(zoo.load('user/repo'), NAME))"
    assert hub.run(read, VITADAPTER_ZOO_OFFLINE="1") == "True\n"
    hub.damage("model.safetensors")
    fresh = str(Path(hub.environment["HF_HOME"]).with_name("hf-2"))
    assert "is not the file that the server announces" in hub.run(read, HF_HOME=fresh)
