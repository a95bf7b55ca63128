"""The Hub, through huggingface_hub itself: each user is a process with HF_ENDPOINT set."""

import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
import safetensors
import standhub
import standins
from forked import BEFORE_THE_HUB, workers

import vitadapter_zoo as zoo
from vitadapter_zoo import MaskRCNN

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
        """Run code in a process of its own; return its output, or its last error."""
        body = "\n".join(f"    {line}" for line in code.strip().splitlines())
        script = f"{PRELUDE}try:\n{body}\nexcept zoo.ZooError as error:\n    print('ERROR', error)"
        given = {**self.environment, **environment}
        result = workers(BEFORE_THE_HUB).run(script, environment=given)
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
            "HF_ENDPOINT": url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_TOKEN": "hf_standin",
            "HF_HUB_DISABLE_XET": "1",  # the stand-in does not speak the Hub's newer protocol
            "VITADAPTER_ZOO_HOME": str(zoo_home),
        },
    )
    process.kill()
    process.wait()


SAME = "print(helpers.same_weights(zoo.load(NAME, checkpoint='{}'), NAME))"


def test_every_name_of_a_hub_file_loads(
    hub: Hub, published_file: Callable[[str], Path], tmp_path: Path
) -> None:
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
    assert any(line.endswith("hf_standin") for line in hub.log())  # with the user's token
    photo, out = str(standins.PHOTO), str(tmp_path / "out")
    commands = [
        ["download", NAME, "--checkpoint", names[0]],
        ["convert", names[0], "--model", NAME, "--out", str(tmp_path / "a.safetensors")],
        ["predict", photo, "--model", NAME, "--checkpoint", standhub.REPO, "--out", out],
    ]
    run = "from vitadapter_zoo.cli import main\n" + "\n".join(
        f"main({command}, standalone_mode=False)" for command in commands
    )
    said = hub.run(run)
    assert (said.count("adapter-t-deit-3x: "), said.count("from a "), said.count("drawn in")) == (
        1,
        1,
        1,
    )
    digest = hashlib.sha256(published_file(NAME).read_bytes()).hexdigest()
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["source_sha256"] == digest
    before = len(hub.log())
    again = SAME.format(names[0])
    assert hub.run(again, VITADAPTER_ZOO_OFFLINE="1") == "True\n"
    assert hub.run(again, HF_HUB_OFFLINE="1") == "True\n"
    assert len(hub.log()) == before + 1  # the log's own request
    hub.add(FILE, published_file("vit-t-deit-3x").read_bytes())
    assert "The file fits vit-t-deit-3x" in hub.run(again)


TRY = """
for name in {names}:
    try:
        zoo.load(NAME, checkpoint=name{options})
    except zoo.ZooError as error:
        print("SAID", str(error).replace(chr(10), " "))
"""


def test_missing_repositories_and_files_are_errors(hub: Hub) -> None:
    messages = {
        "hf://user/none/x.pth": "no such repository",
        "hf://user/gated/x.pth": "its owner has to grant access",
        f"hf://{standhub.REPO}/none.pth": "no such file",
        f"hf://{standhub.REPO}@v9/{FILE}": "no branch, tag or commit 'v9'",
        standhub.REPO: "name one as hf://user/repo/FILE",
        "hf://nonsense": "names no file on the Hub",
    }
    said = hub.run(TRY.format(names=list(messages), options="")).splitlines()
    assert len(said) == len(messages)
    for line, message in zip(said, messages.values(), strict=True):
        assert message in line
    away = hub.run(
        f"zoo.load(NAME, checkpoint='{standhub.REPO}')", HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert "cannot download hf://user/repo" in away


def test_offline_mode_reports_what_is_missing(hub: Hub) -> None:
    names = [f"hf://{standhub.REPO}/{FILE}", standhub.REPO]
    code = TRY.format(names=names, options=", offline=True")
    code += f"zoo.load('{standhub.REPO}', offline=True)\n"
    assert hub.run(code).count("offline mode") == 3
    assert (
        hub.run(code.replace(", offline=True", ""), HF_HUB_OFFLINE="1").count("offline mode") == 3
    )
    assert hub.log() == ["GET /__log__ "]


def test_shards_on_the_hub_are_read(hub: Hub, tiny: MaskRCNN, tmp_path: Path) -> None:
    folder = zoo.save_pretrained(tiny, tmp_path / "mine", max_shard_size="30MB")
    for path in folder.iterdir():
        hub.add(path.name, path.read_bytes())
    code = f"print(helpers.same_weights(zoo.load('{standhub.REPO}'), NAME))\n"
    code += SAME.format(standhub.REPO)
    assert hub.run(code) == "True\n" * 2
    hub.damage("model-00002-of-00004.safetensors")
    fresh = str(tmp_path / "hf-2")
    assert "is not the file that the server announces" in hub.run(code, HF_HOME=fresh)


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


AWAY = """
import time
from vitadapter_zoo.finder import find
for name in ("user/repo", "hf_hub:user/repo"):
    start = time.monotonic()
    try:
        find(name)
    except zoo.ZooError as error:
        print(time.monotonic() - start < 1, error)
start = time.monotonic()
try:
    zoo.load("adapter-t-deit-1x", checkpoint="hf://czczup/ViT-Adapter/x.pth")
except zoo.ZooError as error:
    print(time.monotonic() - start < 1, error)
"""


def test_without_a_network_or_a_cache_the_error_is_immediate(hub: Hub) -> None:
    said = hub.run(AWAY, HF_ENDPOINT="http://127.0.0.1:9").splitlines()
    assert len(said) == 3
    # Without a prefix it may be a mistyped folder.
    folder = "there is no folder 'user/repo' here, and "
    for line, first in zip(said, (folder, "", ""), strict=True):
        assert line.startswith(f"True {first}cannot download hf://")
        assert "cannot be reached (Connection refused) and it is not in the cache" in line


def test_without_a_network_the_cache_is_used(
    hub: Hub, published_file: Callable[[str], Path]
) -> None:
    hub.add(FILE, published_file(NAME).read_bytes())
    code = SAME.format(f"hf://{standhub.REPO}/{FILE}")
    assert hub.run(code) == "True\n"
    assert hub.run(code, HF_ENDPOINT="http://127.0.0.1:9") == "True\n"
