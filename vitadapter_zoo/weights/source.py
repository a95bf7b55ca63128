"""Parse the names of checkpoints: local files, URLs, and files on the Hugging Face Hub."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from urllib.parse import quote, unquote, urlparse

from vitadapter_zoo.catalog import PACKAGE, PACKAGED
from vitadapter_zoo.errors import CheckpointError
from vitadapter_zoo.settings import expanded
from vitadapter_zoo.text import quoted, shown

HUB = "https://huggingface.co"
# The names that the Hub allows: ASCII, neither ".." nor "--", no "." or "-" at the end.
REPO = re.compile(r"(?!.*(?:--|\.\.|\.git$))\w[\w.-]*(?<![.-])/\w[\w.-]*(?<![.-])", re.ASCII)
LONGEST_REPO = 96  # characters
WEIGHTS = (".pth", ".pth.tar", ".pt", ".bin", ".ckpt", ".safetensors")
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class LocalFile:
    """A local file; it is read and never modified."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class Url:
    """A file at an http(s) URL."""

    url: str

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True)
class HubFile:
    """A file in a model repository of the Hub, or the repository's weights.

    Attributes:
        repo: ``user/name``.
        revision: branch, tag or commit; the default branch where None.
        file: path inside the repository; None for the repository's weights file.
    """

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        revision = f"@{quote(self.revision, safe='')}" if self.revision else ""
        return f"hf://{self.repo}{revision}" + (f"/{self.file}" if self.file else "")

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, whose files never change."""
        return self.revision is not None and COMMIT.fullmatch(self.revision) is not None


Source: TypeAlias = LocalFile | Url | HubFile


def parse(text: str | os.PathLike[str]) -> Source:
    """Determine the kind of a name.

    A Hub repository is ``hf://user/repo[@revision][/file]`` (``hf_hub:`` as timm writes it means
    the same), the URL of a file on the Hub (downloaded through huggingface_hub, with its token and
    ``HF_ENDPOINT``), or ``user/repo`` if no local file has that path and the name does not end like
    a weights file.

    ``package:`` begins the path of a file that this package carries.

    Raises:
        CheckpointError: an invalid ``hf://`` name, or the local file does not exist.
    """
    name = os.fspath(text)
    if name.startswith(PACKAGED):
        return LocalFile(PACKAGE / name.removeprefix(PACKAGED))
    for prefix in ("hf_hub:", "hf-hub:"):  # as timm writes them
        if name.startswith(prefix):
            name = f"hf://{name.removeprefix(prefix)}"
    if name.startswith("hf://"):
        found = re.fullmatch(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?", name)
        if not found or not _is_repo(found[1]):
            raise CheckpointError(
                f"{quoted(name)} names no file on the Hub: write hf://user/repo, "
                "hf://user/repo@revision or hf://user/repo@revision/file"
            )
        return HubFile(found[1], unquote(found[2]) if found[2] else None, found[3])
    if name.startswith(("http://", "https://")):
        return _on_the_hub(name) or Url(name)
    path = expanded(name).absolute()
    is_id = isinstance(text, str) and _is_repo(name) and not name.lower().endswith(WEIGHTS)
    if not path.exists() and is_id:
        return HubFile(name)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint file {shown(path, 300)}")
    return LocalFile(path)


def _is_repo(name: str) -> bool:
    """Whether the Hub may have a repository of that name, ``user/repo``."""
    return len(name) <= LONGEST_REPO and REPO.fullmatch(name) is not None


def _on_the_hub(url: str) -> HubFile | None:
    hosts = (HUB, os.environ.get("HF_ENDPOINT", HUB).rstrip("/"))
    for host in hosts:
        if url.startswith(f"{host}/"):
            path = unquote(urlparse(url[len(host) :]).path)
            found = re.fullmatch(r"/([^/]+/[^/]+)/(?:resolve|blob|raw)/([^/]+)/(.+)", path)
            if found and _is_repo(found[1]):
                return HubFile(found[1], None if found[2] == "main" else found[2], found[3])
    return None
