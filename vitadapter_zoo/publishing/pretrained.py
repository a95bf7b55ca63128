"""Detectors as folders in the Hub's form: written, published, and read back."""

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub import save_torch_state_dict

from vitadapter_zoo._version import __version__
from vitadapter_zoo.catalog import Row, get_row
from vitadapter_zoo.errors import CheckpointError, ZooError
from vitadapter_zoo.models import MaskRCNN, build
from vitadapter_zoo.publishing import cards
from vitadapter_zoo.weights import atomic, checkpoint, convert, hub
from vitadapter_zoo.weights.checkpoint import INDEX, SINGLE, shard_names
from vitadapter_zoo.weights.progress import Report
from vitadapter_zoo.weights.source import HubFile

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
LARGEST_CONFIG = 1 << 20  # bytes


def save_pretrained(
    model: MaskRCNN, folder: str | os.PathLike[str], *, max_shard_size: int | str = "5GB"
) -> Path:
    """Write a detector as the Hub expects it; ``vitadapter_zoo.load(folder)`` reads it back.

    Written are ``model.safetensors`` (or shards with an index), ``config.json``,
    ``preprocessor_config.json`` and, unless there is one, ``README.md``. The weights come first and
    ``config.json`` last, so that a folder with a config is whole.

    Args:
        model: the detector, fine-tuned or not.
        folder: made where it does not exist.
        max_shard_size: largest weights file, bytes or like ``"1GB"``.

    Returns:
        The folder.

    Raises:
        ZooError: the folder cannot be written to.
    """
    target = Path(folder)
    row = model.row
    with atomic.writing_to(target):
        target.mkdir(parents=True, exist_ok=True)
        (target / CONFIG).unlink(missing_ok=True)
        metadata = {"format": "pt", "model": row.name, "license": row.license}
        tensors = {name: value.cpu() for name, value in model.state_dict().items()}
        atomic.check_space(target, sum(value.nbytes for value in tensors.values()))
        save_torch_state_dict(tensors, target, max_shard_size=max_shard_size, metadata=metadata)
    if not (target / "README.md").exists():
        atomic.write_text(target / "README.md", str(cards.saved_card(row, model.categories)))
    atomic.write_json(
        target / PREPROCESSOR,
        {
            "image_processor_type": "vitadapter-zoo",
            "do_resize": True,
            "size": {"longest_edge": row.input_size[0], "shortest_edge": row.input_size[1]},
            "do_rescale": False,
            "do_normalize": True,
            "image_mean": row.mean,
            "image_std": row.std,
        },
    )
    atomic.write_json(
        target / CONFIG,
        {
            "architectures": ["MaskRCNN"],
            "library_name": "vitadapter-zoo",
            "library_version": __version__,
            "model": row.name,
            "id2label": {str(index): name for index, name in enumerate(model.categories)},
            "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        },
    )
    return target


def push_to_hub(
    model: MaskRCNN,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with vitadapter-zoo",
) -> str:
    """Publish a detector as a model repository of the Hub, which is made if need be.

    Args:
        model: the detector.
        repo_id: ``user/name``.
        private: for a new repository; None takes the account's default.
        token: of the Hub; the one of ``hf auth login`` by default.
        revision: branch to write to; the default branch by default.
        commit_message: of the one commit that is made.

    Returns:
        The address of the commit.

    Raises:
        ZooError: the Hub cannot be reached or refuses.
    """
    api = huggingface_hub.HfApi(token=token, library_name="vitadapter-zoo")
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
            )
        # huggingface_hub lets its HTTP library's errors through beside its own.
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ZooError(
                f"cannot publish to {repo_id}: {reason}; check the name, the connection and "
                "`hf auth whoami`"
            ) from error
    return commit.commit_url


def read_folder(folder: Path) -> MaskRCNN:
    """The detector of a local folder in the Hub's form, on the CPU.

    Raises:
        CheckpointError: the folder, its configuration or its weights are not a detector's.
    """
    config, row = _read_configuration(folder)
    names = shard_names(folder / INDEX) if (folder / INDEX).exists() else [SINGLE]
    paths = [folder / name for name in names]
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise CheckpointError(f"{folder} lacks {absent[0]}; save or download the folder again")
    model = _build(row, config, folder)
    loaded = checkpoint.read_all(paths, str(folder))
    model.load_state_dict(convert.fit(loaded, row, model, str(folder)).tensors, assign=True)
    dtype = getattr(torch, str(config.get("torch_dtype")), None)
    return model.to(dtype=dtype) if isinstance(dtype, torch.dtype) else model


def fetch_folder(source: HubFile, home: Path, report: Report, *, offline: bool) -> Path:
    """Bring a published detector into huggingface_hub's cache; its folder there.

    Raises:
        DownloadError: absent, not allowed, unreachable, or with other hashes than announced.
        CheckpointError: the repository is not a detector's.
    """
    for name in (CONFIG, PREPROCESSOR):
        config = hub.fetch(replace(source, file=name), home, report, offline=offline)
    pinned = replace(source, revision=hub.commit_of(config) or source.revision)
    chosen = hub.choose(pinned, offline=offline)
    hub.fetch_weights(chosen, home, report, offline=offline)
    return config.parent


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise ValueError("it is too large")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"{path} cannot be read ({reason}): the folder is not one that "
            "vitadapter_zoo.save_pretrained wrote"
        ) from error
    return content


def _read_configuration(folder: Path) -> tuple[dict[str, Any], Row]:
    config = _read_json(folder / CONFIG)
    prepared = _read_json(folder / PREPROCESSOR)
    row = get_row(str(config.get("model")))
    try:
        size = prepared["size"]
        mean, std = (tuple(float(x) for x in prepared[f"image_{k}"]) for k in ("mean", "std"))
        if len(mean) != 3 or len(std) != 3:
            raise ValueError("mean and std have three values each")
        edges = (int(size["longest_edge"]), int(size["shortest_edge"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / PREPROCESSOR} is not complete: {error}") from error
    return config, replace(row, input_size=edges, mean=mean, std=std)


def _build(row: Row, config: dict[str, Any], folder: Path) -> MaskRCNN:
    labels = config.get("id2label")
    try:
        categories = tuple(str(labels[str(index)]) for index in range(len(labels)))  # type: ignore[index,arg-type]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: id2label must number the classes") from error
    with torch.device("meta"):
        return build(row, categories)
