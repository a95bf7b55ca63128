"""Initial weights of a run: random as in the original, pretrained, or of a trained detector."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from torch import nn

from vitadapter_zoo import settings
from vitadapter_zoo.catalog import list_models
from vitadapter_zoo.errors import CheckpointError
from vitadapter_zoo.loader import find, load
from vitadapter_zoo.models import MaskRCNN, build
from vitadapter_zoo.models.initial import draw
from vitadapter_zoo.models.trunk import AroundTimm
from vitadapter_zoo.text import shown
from vitadapter_zoo.weights.heads import for_classes
from vitadapter_zoo.weights.pretraining import read_pretraining

PUBLISHED, PRETRAINING, SCRATCH = "published", "pretraining", "scratch"


def starting_model(
    name: str | os.PathLike[str],
    start: str | os.PathLike[str],
    classes: tuple[str, ...],
    *,
    input_size: tuple[int, int] | None = None,
    seed: int = 0,
    cache_dir: settings.Home = None,
    offline: bool | None = None,
    progress: bool = True,
) -> tuple[MaskRCNN, str]:
    """Build the detector that training starts with; describe the origin of its weights in a line.

    Args:
        name: load name, or a folder or repository as for ``load``: the network to train.
        start: ``"published"`` (the weights of ``name`` itself), ``"pretraining"`` (the trunk's,
            as the paper's own training began), ``"scratch"``, or another load name, folder or
            checkpoint file.
        classes: names of the classes to learn. Heads keep the classes of the same name.
        input_size: (longest, shortest) side in pixels; the row's own by default.
        seed: of the fresh weights.
        cache_dir: as for ``load``.
        offline: as for ``load``.
        progress: as for ``load``.

    Raises:
        ZooError: what ``load`` raises, or weights that are not this network's.
    """
    row = find(name, cache_dir=cache_dir, offline=offline, progress=progress).row
    model = build(row if input_size is None else replace(row, input_size=input_size), classes)
    if start in (SCRATCH, PRETRAINING):
        initialize(model, seed)
    if start == SCRATCH:
        return model, "random initial weights"
    if start == PRETRAINING:
        if row.network is not None:
            raise CheckpointError(
                f"{shown(os.fspath(name))} is a trained detector: `--from pretraining` is for a "
                "name of `vitadapter-zoo list`, or with --backbone"
            )
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
        return model, f"trunk of {row.pretraining_name}, all other weights random"
    wanted, checkpoint = (name if start == PUBLISHED else start), None
    if start != PUBLISHED and os.fspath(start) not in list_models():
        path = settings.expanded(start)
        if path.is_file():
            wanted, checkpoint = name, path
    source = load(
        wanted, checkpoint=checkpoint, cache_dir=cache_dir, offline=offline, progress=progress
    )
    return model, carry_over(source, model, shown(os.fspath(checkpoint or wanted)))


def carry_over(source: MaskRCNN, target: MaskRCNN, origin: str) -> str:
    """Copy a trained detector's weights; heads keep the classes of the same name.

    Args:
        source: the trained one.
        target: the new one; heads of classes that ``source`` does not have are drawn afresh.
        origin: what ``source`` is called.

    Returns:
        One line that says which classes keep their heads.

    Raises:
        CheckpointError: they are different networks.
    """
    weights = for_classes(source.state_dict(), source.categories, target.categories)
    wanted = target.state_dict()
    wrong = sorted(weights.keys() ^ wanted.keys()) or [
        name for name, value in weights.items() if value.shape != wanted[name].shape
    ]
    if wrong:
        raise CheckpointError(
            f"{origin} is another network than {target.row.name}: {len(wrong)} weights differ in "
            f"name or shape, {wrong[0]} for instance; start from weights of the same network, or "
            "with `--from pretraining` or `--from scratch`"
        )
    target.load_state_dict(weights)
    if isinstance(source.backbone, AroundTimm) and isinstance(target.backbone, AroundTimm):
        target.backbone.read_digest = source.backbone.read_digest
    kept = [name for name in target.categories if name in source.categories]
    fresh = [name for name in target.categories if name not in source.categories]
    line = f"weights of {origin}"
    if kept:
        line += f"; heads kept for {_few(kept)}"
    return line + (f"; fresh heads for {_few(fresh)}" if fresh else "")


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(shown(name, 30) for name in names[:4]) + more


def initialize(model: MaskRCNN, seed: int = 0) -> None:
    """Initialise all weights with the distributions of the original code.

    A trunk of timm keeps the weights that timm drew.

    Args:
        model: a detector on the CPU.
        seed: the same seed draws the same weights.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        if isinstance(model.backbone, AroundTimm):
            nn.init.normal_(model.backbone.level_embed)
            model.backbone.draw_adapter(draw)
        else:
            _initialize_backbone(model.backbone)
        for part in (model.neck, model.rpn_head, model.roi_head):
            for module in part.modules():
                _initialize_head(module, part is model.rpn_head)
        for module in model.roi_head.mask_head.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(model.roi_head.bbox_head.fc_cls.weight, std=0.01)
        nn.init.normal_(model.roi_head.bbox_head.fc_reg.weight, std=0.001)


def _initialize_backbone(backbone: nn.Module) -> None:
    for name, parameter in backbone.named_parameters():
        if name.endswith(("pos_embed", "temporal_pos_embed")):
            nn.init.trunc_normal_(parameter, std=0.02)
        elif name.endswith("level_embed"):
            nn.init.normal_(parameter)
    draw(backbone)


def _initialize_head(module: nn.Module, proposals: bool) -> None:
    if not isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        return
    if proposals:
        nn.init.normal_(module.weight, std=0.01)
    else:
        nn.init.xavier_uniform_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
