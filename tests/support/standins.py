"""Stand-in weights for tests: pseudorandom values that depend only on a parameter's name and shape.

The published weights cannot be downloaded offline. The tests therefore compare this package with
the original on weights that both can generate. NEP 19 guarantees that numpy.random.RandomState
(MT19937) generates the same values in every release.
"""

import json
import os
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).parents[1] / "data"
PHOTO = DATA / "rocket.jpg"

# These values keep activations at O(1) and spread scores over (0, 1).
_GAINS = {
    "rpn_head.rpn_cls.weight": 0.5,
    "rpn_head.rpn_reg.weight": 0.1,
    "roi_head.bbox_head.fc_cls.weight": 0.8,
    "roi_head.bbox_head.fc_reg.weight": 0.5,
}
_LAYER_SCALES = ("gamma", "gamma1", "gamma2", "gamma_1", "gamma_2")


def contract(row: str) -> dict[str, list[int]]:
    """Return every state-dict name of a row with its shape, in the original's order."""
    names: dict[str, list[int]] = json.loads((DATA / "contracts" / f"{row}.json").read_text())
    return names


def tensor(name: str, shape: list[int]) -> Tensor:
    """Return the stand-in for a parameter: float32, or int64 for BatchNorm counters."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    if leaf == "running_var":
        values = 0.5 + rng.random_sample(shape)
    elif name.endswith("sampling_offsets.bias"):
        values = 2.0 * rng.standard_normal(shape)
    elif leaf in _LAYER_SCALES:
        values = 0.3 + 0.05 * rng.standard_normal(shape)
    elif leaf == "weight" and len(shape) == 1:
        values = 1.0 + 0.1 * rng.standard_normal(shape)
    elif leaf in ("bias", "running_mean"):
        values = 0.05 * rng.standard_normal(shape)
    elif leaf in ("level_embed", "cls_token") or "pos_embed" in name:
        values = 0.2 * rng.standard_normal(shape)
    else:
        fan_in = int(np.prod(shape[1:]))
        values = rng.standard_normal(shape) * _GAINS.get(name, 1.0) / np.sqrt(fan_in)
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def state_dict(row: str) -> dict[str, Tensor]:
    """Return stand-in weights for every parameter of a row.

    The folder ``STANDIN_WEIGHTS`` in the environment, where there is one, keeps them for the other
    processes of a test run. Changes of the returned tensors do not reach the file.
    """
    folder = os.environ.get("STANDIN_WEIGHTS")
    if not folder:
        return _generate(row)
    path = Path(folder) / f"{row}.pt"
    if not path.exists():
        whole(path, _generate(row))
    tensors: dict[str, Tensor] = torch.load(path, mmap=True, weights_only=True)
    return tensors


def whole(path: Path, content: object) -> None:
    """Save with ``torch.save`` so that other processes see the whole file or none."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        torch.save(content, Path(folder) / path.name)
        (Path(folder) / path.name).replace(path)


def _generate(row: str) -> dict[str, Tensor]:
    return {name: tensor(name, shape) for name, shape in contract(row).items()}


def checkpoint(row: str) -> dict[str, object]:
    """Return a checkpoint in the format of the published files: weights with mmcv 1.x metadata."""
    return {
        "meta": {
            "env_info": "sys.platform: linux",
            "mmdet_version": "2.22.0",
            "mmcv_version": "1.4.2",
            "seed": 1,
            "exp_name": f"{row}.py",
            "epoch": 36,
            "iter": 263844,
            "hook_msgs": {"best_score": np.float64(0.46)},
        },
        "state_dict": state_dict(row),
    }
