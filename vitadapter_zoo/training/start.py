"""What a run starts from: fresh weights as the original draws them, or a trained detector's."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vitadapter_zoo.catalog import get_row, list_models
from vitadapter_zoo.errors import CheckpointError
from vitadapter_zoo.loader import load
from vitadapter_zoo.models import MaskRCNN, build
from vitadapter_zoo.models.adapter import MSDeformAttn
from vitadapter_zoo.weights.pretraining import read_pretraining

PUBLISHED, PRETRAINING, SCRATCH = "published", "pretraining", "scratch"

# Parameters with rows for each class: rows for a class, and whether the background follows.
CLASS_ROWS = {
    "roi_head.bbox_head.fc_cls": (1, True),
    "roi_head.bbox_head.fc_reg": (4, False),
    "roi_head.mask_head.conv_logits": (1, False),
}


def starting_model(
    name: str | os.PathLike[str],
    start: str | os.PathLike[str],
    classes: tuple[str, ...],
    *,
    input_size: tuple[int, int] | None = None,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool | None = None,
    progress: bool = True,
) -> tuple[MaskRCNN, str]:
    """The detector that training begins with, and one line that says where its weights are from.

    Args:
        name: load name, or a folder or repository as for ``load``: the network to train.
        start: ``"published"`` (the weights of ``name`` itself), ``"pretraining"`` (the trunk's,
            as the paper's own training began), ``"scratch"``, or another load name, folder or
            checkpoint file.
        classes: names of the classes to learn.
        input_size: (longest, shortest) side in pixels; the row's own by default.
        seed: of the fresh weights.
        cache_dir: as for ``load``.
        offline: as for ``load``.
        progress: as for ``load``.

    Raises:
        ZooError: what ``load`` raises, or weights that are not this network's.
    """
    published = os.fspath(name) in list_models()
    source = None
    if not published or start not in (PRETRAINING, SCRATCH):
        source = _trained(name, start, cache_dir, offline, progress)
    row = get_row(os.fspath(name)) if published or source is None else source.row
    model = build(row if input_size is None else replace(row, input_size=input_size), classes)
    initialize(model, seed)
    if start == SCRATCH:
        return model, "all weights are fresh"
    if start == PRETRAINING:
        if not row.pretraining_url:
            raise CheckpointError(
                f"{row.name} has no pretraining: it was trained from scratch (`--from scratch`)"
            )
        read_pretraining(
            model.backbone,
            row.pretraining_url,
            resize_positions=True,
            cache_dir=cache_dir,
            offline=offline,
            progress=progress,
        )
        return model, f"trunk of {row.pretraining_name}, all else is fresh"
    assert source is not None  # noqa: S101  the two other starts are done
    return model, carry_over(source, model, os.fspath(name if start == PUBLISHED else start))


def _trained(
    name: str | os.PathLike[str],
    start: str | os.PathLike[str],
    cache_dir: str | os.PathLike[str] | None,
    offline: bool | None,
    progress: bool,
) -> MaskRCNN:
    wanted = name if start in (PUBLISHED, PRETRAINING, SCRATCH) else start
    checkpoint = None
    if wanted is start and os.fspath(start) not in list_models() and Path(start).is_file():
        wanted, checkpoint = name, start
    return load(
        wanted, checkpoint=checkpoint, cache_dir=cache_dir, offline=offline, progress=progress
    )


def carry_over(source: MaskRCNN, target: MaskRCNN, origin: str) -> str:
    """Copy a trained detector's weights; heads keep the classes of the same name.

    Args:
        source: the trained one.
        target: the new one, whose own weights stay where a class is new.
        origin: what ``source`` is called.

    Returns:
        One line that says which classes keep their heads.

    Raises:
        CheckpointError: they are different networks.
    """
    old, new = source.state_dict(), target.state_dict()
    by_class = {f"{name}.{kind}" for name in CLASS_ROWS for kind in ("weight", "bias")}
    wrong = [
        name for name in old.keys() ^ new.keys() | (old.keys() & new.keys())
        if name not in by_class and (
            name not in old or name not in new or old[name].shape != new[name].shape
        )
    ]  # fmt: skip
    if wrong:
        raise CheckpointError(
            f"{origin} is another network than {target.row.name}: {len(wrong)} weights differ in "
            f"name or shape, {sorted(wrong)[0]} for instance; start from weights of the same "
            "network, or with `--from pretraining` or `--from scratch`"
        )
    places = {name: label for label, name in enumerate(source.categories)}
    kept = [name for name in target.categories if name in places]
    pairs = [(target.categories.index(name), places[name]) for name in kept]
    with torch.no_grad():
        for name, value in new.items():
            if name not in by_class:
                value.copy_(old[name])
                continue
            rows, background = CLASS_ROWS[name.rpartition(".")[0]]
            for new_label, old_label in pairs:
                value[new_label * rows : (new_label + 1) * rows] = old[name][
                    old_label * rows : (old_label + 1) * rows
                ]
            if background:
                value[-1] = old[name][-1]
    fresh = [name for name in target.categories if name not in places]
    line = f"weights of {origin}"
    if kept:
        line += f"; heads kept for {_few(kept)}"
    return line + (f"; fresh heads for {_few(fresh)}" if fresh else "")


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def initialize(model: MaskRCNN, seed: int = 0) -> None:
    """Draw all weights as the original's constructors do.

    Args:
        model: a detector on the CPU.
        seed: the same seed draws the same weights.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for name, parameter in model.backbone.named_parameters():
            if name.endswith(("pos_embed", "temporal_pos_embed")):
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("level_embed"):
                nn.init.normal_(parameter)
        model.backbone.apply(_initialize_backbone)
        model.backbone.apply(_initialize_sampling)
        for part in (model.neck, model.rpn_head, model.roi_head):
            for module in part.modules():
                _initialize_head(module, part is model.rpn_head)
        for module in model.roi_head.mask_head.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(model.roi_head.bbox_head.fc_cls.weight, std=0.01)
        nn.init.normal_(model.roi_head.bbox_head.fc_reg.weight, std=0.001)


def _initialize_backbone(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _initialize_sampling(module: nn.Module) -> None:
    """Deformable DETR (arXiv:2010.04159): heads look in directions of their own, evenly."""
    if not isinstance(module, MSDeformAttn):
        return
    angles = torch.arange(module.heads) * (2 * math.pi / module.heads)
    directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
    directions = directions / directions.abs().amax(dim=-1, keepdim=True)
    offsets: Tensor = module.sampling_offsets.bias
    points = offsets.numel() // (2 * module.heads * module.levels)
    steps = torch.arange(1, points + 1)[:, None]
    grid = directions[:, None, None] * steps  # [heads, 1, points, 2]
    offsets.copy_(grid.expand(-1, module.levels, -1, -1).flatten())
    nn.init.zeros_(module.sampling_offsets.weight)
    for zeroed in (module.attention_weights.weight, module.attention_weights.bias):
        nn.init.zeros_(zeroed)
    for projection in (module.value_proj, module.output_proj):
        nn.init.xavier_uniform_(projection.weight)
        nn.init.zeros_(projection.bias)


def _initialize_head(module: nn.Module, proposals: bool) -> None:
    if not isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        return
    if proposals:
        nn.init.normal_(module.weight, std=0.01)
    else:
        nn.init.xavier_uniform_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
