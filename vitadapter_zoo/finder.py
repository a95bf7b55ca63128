"""Find the detector that a user's name means, without reading its weights.

Every command and function that takes a model name looks it up here, so that all of them take the
same names. Nothing here needs torch.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from vitadapter_zoo import settings
from vitadapter_zoo.catalog import Row, get_row, list_models
from vitadapter_zoo.errors import CheckpointError, DownloadError
from vitadapter_zoo.text import quoted
from vitadapter_zoo.weights import cache
from vitadapter_zoo.weights.progress import bars
from vitadapter_zoo.weights.source import HubFile, LocalFile, parse

EXPLICIT = ("hf://", "hf_hub:", "hf-hub:")  # prefixes of a repository's name


@dataclass(frozen=True)
class Found:
    """A detector by its name.

    Attributes:
        name: what the user called it.
        row: its row; for a folder, with the folder's own image settings.
        categories: names of its classes, in the order of the outputs.
        dtype: name of the floating-point type that its weights are loaded with.
        place: its folder or its repository on the Hub; None for a name of the catalog.
    """

    name: str
    row: Row
    categories: tuple[str, ...]
    dtype: str
    place: Path | HubFile | None


def find(
    name: str | os.PathLike[str],
    *,
    cache_dir: settings.Home = None,
    offline: bool | None = None,
    progress: bool = True,
) -> Found:
    """Look up any name that ``load`` accepts.

    For a folder its two JSON files are read; for a repository of the Hub they are downloaded. The
    weights are not touched.

    Args:
        name: a load name of the catalog, a folder that ``save_pretrained`` wrote, or a repository
            of the Hub: ``user/repo``, ``hf://user/repo[@revision]`` or ``hf_hub:user/repo``.
        cache_dir: as for ``load``.
        offline: as for ``load``.
        progress: as for ``load``.

    Raises:
        UnknownModelError: no such name; the message suggests similar names.
        CheckpointError: the folder is not one of a detector, or the name is a file's.
        DownloadError: the repository cannot be reached.
    """
    place = place_of(name)
    text = os.fspath(name)
    if place is None:
        row = get_row(text)
        return Found(text, row, row.classes, "float32", None)
    from vitadapter_zoo.publishing.folder import fetch_configuration, read_configuration

    folder = place
    if isinstance(folder, HubFile):
        home, without_network = settings.home(cache_dir), settings.is_offline(offline)
        try:
            with bars(progress) as lines:
                folder = fetch_configuration(
                    folder, home, lines(str(folder)), offline=without_network
                )
        except DownloadError as error:
            if text.startswith(EXPLICIT):
                raise
            # A mistyped folder looks like a repository.
            raise type(error)(
                f"there is no folder {quoted(text, 200)} here, and {error}"
            ) from error
    read = read_configuration(folder)
    return Found(text, read.row, read.categories, read.dtype, place)


def place_of(name: str | os.PathLike[str]) -> Path | HubFile | None:
    """Return the folder or repository that a name means; None for a name of the catalog.

    Raises:
        CheckpointError: the name is a file's.
    """
    text = os.fspath(name)
    if text in list_models():
        return None  # even if a folder has that name; ./NAME means the folder
    if not isinstance(name, str) or settings.expanded(text).is_dir():
        return settings.expanded(text).absolute()
    if "/" in text or text.startswith(("hf_hub:", "hf-hub:")):
        source = parse(text)
        if isinstance(source, HubFile) and source.file is None:
            return source
        raise CheckpointError(
            f"{quoted(text, 200)} is a file: give it as the checkpoint of a model, "
            "load(NAME, checkpoint=...) or --model NAME --checkpoint FILE"
        )
    return None


def cached_bytes(row: Row, *, cache_dir: settings.Home = None) -> int | None:
    """Return the size of a row's converted published weights in the cache.

    Returns:
        Bytes; None if they are not in the cache, or are in the package.
    """
    source = parse(row.checkpoint_url)
    if isinstance(source, LocalFile):
        return None
    provenance = cache.entry(row.name, str(source), cache_dir).read()
    return provenance.size if provenance else None
