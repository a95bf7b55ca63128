"""Save detectors as folders in the Hub's form, and publish them."""

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import save_torch_state_dict

from vitadapter_zoo._version import __version__
from vitadapter_zoo.catalog import Row
from vitadapter_zoo.errors import CheckpointError, ConfigError, ZooError
from vitadapter_zoo.models import MaskRCNN
from vitadapter_zoo.models.trunk import TRUNK, AroundTimm
from vitadapter_zoo.publishing import cards
from vitadapter_zoo.publishing.folder import CONFIG, NETWORK, PREPROCESSOR, fetch_configuration
from vitadapter_zoo.settings import expanded
from vitadapter_zoo.text import shown
from vitadapter_zoo.weights import atomic, hub
from vitadapter_zoo.weights.progress import Report
from vitadapter_zoo.weights.shards import INDEX, SINGLE, shard_names
from vitadapter_zoo.weights.source import HubFile
from vitadapter_zoo.weights.trunks import digest


def save_pretrained(
    model: MaskRCNN,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    reference_backbone: bool = False,
) -> Path:
    """Write a detector in the Hub's form; ``vitadapter_zoo.load(folder)`` reads it back.

    The files are ``model.safetensors`` (or shards with an index), ``config.json``,
    ``preprocessor_config.json`` and, unless it exists, ``README.md``. The weights are written
    first and ``config.json`` last, so that a folder with a ``config.json`` is complete.

    Args:
        model: the detector, fine-tuned or not.
        folder: created if it does not exist.
        max_shard_size: largest weights file, bytes or like ``"1GB"``.
        reference_backbone: of a detector around a frozen timm trunk, leave the trunk's weights out
            and refer to their file by name and sha256. ``load`` then reads that file.

    Returns:
        The folder.

    Raises:
        ConfigError: ``reference_backbone`` for a detector whose trunk is not the one of a file.
        ZooError: the folder cannot be written to.
    """
    target = expanded(folder)
    row = _saved_row(model, reference_backbone)
    with atomic.writing_to(target):
        target.mkdir(parents=True, exist_ok=True)
        (target / CONFIG).unlink(missing_ok=True)
        metadata = {"format": "pt", "model": row.name, "license": row.license}
        # Weights on CUDA are in channels-last order, which the format does not have.
        tensors = {
            name: value.cpu().contiguous()
            for name, value in model.state_dict().items()
            if not (reference_backbone and name.startswith(TRUNK))
        }
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
    config: dict[str, Any] = {
        "architectures": ["MaskRCNN"],
        "library_name": "vitadapter-zoo",
        "library_version": __version__,
        "model": row.name,
        "id2label": {str(index): name for index, name in enumerate(model.categories)},
        "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
    if row.network is not None:
        config[NETWORK] = row.network.record()
    atomic.write_json(target / CONFIG, config)
    return target


def _saved_row(model: MaskRCNN, reference: bool) -> Row:
    """The detector's row, whose network says whether the folder holds the trunk's weights.

    Raises:
        ConfigError: they cannot be left out.
    """
    row = model.row
    if row.network is None or not isinstance(model.backbone, AroundTimm):
        if reference:
            raise ConfigError(
                f"reference_backbone is for detectors around a timm model, not for {row.name}"
            )
        return row
    if reference:
        backbone, network = model.backbone, row.network
        if not (network.frozen and network.weights and network.sha256):
            raise ConfigError(
                f"reference_backbone: the trunk of {row.name} is not frozen, or did not start from "
                "pretrained weights: save the detector with its trunk"
            )
        if backbone.read_digest is None or backbone.read_digest != digest(backbone.backbone):
            raise ConfigError(
                f"reference_backbone: the trunk's weights of {row.name} are not as they were read "
                f"from {shown(network.weights)}: save the detector with its trunk"
            )
    return replace(row, network=replace(row.network, stored=not reference))


def push_to_hub(
    model: MaskRCNN,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with vitadapter-zoo",
    reference_backbone: bool = False,
) -> str:
    """Publish a detector as a model repository of the Hub; the repository is created if needed.

    Args:
        model: the detector.
        repo_id: ``user/name``.
        private: for a new repository; None uses the account's default.
        token: access token of the Hub; the one of ``hf auth login`` by default.
        revision: branch to write to; the default branch by default.
        commit_message: message of the commit.
        reference_backbone: as for ``save_pretrained``.

    Returns:
        The URL of the commit.

    Raises:
        ConfigError: as ``save_pretrained``.
        ZooError: the Hub cannot be reached or refuses.
    """
    api = huggingface_hub.HfApi(token=token, library_name="vitadapter-zoo")
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, reference_backbone=reference_backbone)
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
    """List the weights files of a local folder in the Hub's form: one file, or shards.

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
    """Download a published detector into huggingface_hub's cache; return its folder there.

    Raises:
        DownloadError: absent, not allowed, unreachable, or with other hashes than announced.
        CheckpointError: the repository is not a detector's.
    """
    folder = fetch_configuration(source, home, report, offline=offline)
    pinned = replace(source, revision=hub.commit_of(folder / CONFIG) or source.revision)
    chosen = hub.choose(pinned, offline=offline)
    hub.fetch_weights(chosen, home, report, offline=offline)
    return folder
