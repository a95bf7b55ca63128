"""Save detectors as folders in the Hub's form, and publish them."""

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import huggingface_hub
from huggingface_hub import save_torch_state_dict

from vitadapter_zoo._version import __version__
from vitadapter_zoo.errors import CheckpointError, ZooError
from vitadapter_zoo.models import MaskRCNN
from vitadapter_zoo.publishing import cards
from vitadapter_zoo.publishing.folder import CONFIG, PREPROCESSOR, fetch_configuration
from vitadapter_zoo.settings import expanded
from vitadapter_zoo.text import shown
from vitadapter_zoo.weights import atomic, hub
from vitadapter_zoo.weights.progress import Report
from vitadapter_zoo.weights.shards import INDEX, SINGLE, shard_names
from vitadapter_zoo.weights.source import HubFile


def save_pretrained(
    model: MaskRCNN, folder: str | os.PathLike[str], *, max_shard_size: int | str = "5GB"
) -> Path:
    """Write a detector in the Hub's form; ``vitadapter_zoo.load(folder)`` reads it back.

    The files are ``model.safetensors`` (or shards with an index), ``config.json``,
    ``preprocessor_config.json`` and, unless it exists, ``README.md``. The weights are written
    first and ``config.json`` last, so that a folder with a ``config.json`` is complete.

    Args:
        model: the detector, fine-tuned or not.
        folder: created if it does not exist.
        max_shard_size: largest weights file, bytes or like ``"1GB"``.

    Returns:
        The folder.

    Raises:
        ZooError: the folder cannot be written to.
    """
    target = expanded(folder)
    row = model.row
    with atomic.writing_to(target):
        target.mkdir(parents=True, exist_ok=True)
        (target / CONFIG).unlink(missing_ok=True)
        metadata = {"format": "pt", "model": row.name, "license": row.license}
        # Weights on CUDA are in channels-last order, which the format does not have.
        tensors = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
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
    """Publish a detector as a model repository of the Hub; the repository is created if needed.

    Args:
        model: the detector.
        repo_id: ``user/name``.
        private: for a new repository; None uses the account's default.
        token: access token of the Hub; the one of ``hf auth login`` by default.
        revision: branch to write to; the default branch by default.
        commit_message: message of the commit.

    Returns:
        The URL of the commit.

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
        # huggingface_hub raises exceptions of its HTTP library in addition to its own.
        except Exception as error:
            reason = shown(str(error).strip().partition("\n")[0] or type(error).__name__, 200)
            raise ZooError(
                f"cannot publish to {repo_id}: {reason}; check the name, the connection and "
                "`hf auth whoami`"
            ) from error
    return commit.commit_url


def weights_files(folder: Path) -> list[Path]:
    """The weights of a local folder in the Hub's form: one file, or shards.

    Raises:
        CheckpointError: one of them is missing.
    """
    names = shard_names(folder / INDEX) if (folder / INDEX).exists() else [SINGLE]
    paths = [folder / name for name in names]
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise CheckpointError(
            f"{folder} lacks {shown(absent[0])}; save or download the folder again"
        )
    return paths


def fetch_folder(source: HubFile, home: Path, report: Report, *, offline: bool) -> Path:
    """Download a published detector into huggingface_hub's cache; its folder there.

    Raises:
        DownloadError: absent, not allowed, unreachable, or with other hashes than announced.
        CheckpointError: the repository is not a detector's.
    """
    folder = fetch_configuration(source, home, report, offline=offline)
    pinned = replace(source, revision=hub.commit_of(folder / CONFIG) or source.revision)
    chosen = hub.choose(pinned, offline=offline)
    hub.fetch_weights(chosen, home, report, offline=offline)
    return folder
