"""The Hub's names of weights files, and the index of sharded weights. Imports no torch."""

from pathlib import Path

from vitadapter_zoo.errors import CheckpointError
from vitadapter_zoo.text import read_json, shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LARGEST_INDEX = 64 << 20  # bytes
MOST_CLASSES = 10_000
LONGEST_NAME = 200  # characters of a class name


def shard_names(index: Path) -> list[str]:
    """The files that an index of sharded safetensors names, all in the index's own folder.

    Raises:
        CheckpointError: not an index, or one that names files elsewhere.
    """
    try:
        names = sorted(set(read_json(index, LARGEST_INDEX)["weight_map"].values()))
        if not names or any(Path(name).name != name or name in ("", "..") for name in names):
            raise ValueError("it names files outside its own folder, or none")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is not an index of sharded safetensors: {shown(error)}"
        ) from error
    return names
