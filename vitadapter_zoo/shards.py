"""The Hub's names for safetensors weights, in one file or in several with an index."""

import json
from pathlib import Path

from vitadapter_zoo.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LARGEST_INDEX = 64 << 20  # bytes


def shard_names(index: Path) -> list[str]:
    """The files that an index of sharded safetensors names, all in the index's own folder.

    Raises:
        CheckpointError: not an index, or one that names files elsewhere.
    """
    try:
        if index.stat().st_size > LARGEST_INDEX:
            raise ValueError(f"larger than {LARGEST_INDEX >> 20} MB")
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if not names or any(Path(name).name != name or name in ("", "..") for name in names):
            raise ValueError("it names files outside its own folder, or none")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of sharded safetensors: {error}") from error
    return names
