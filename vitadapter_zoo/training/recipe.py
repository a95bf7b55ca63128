"""The hyperparameters of a training run; the defaults are the paper's."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from vitadapter_zoo.catalog import Row
from vitadapter_zoo.models import layer_decay

if TYPE_CHECKING:
    from torch import nn

Schedule = Literal["step", "cosine"]
Augment = Literal["multi-scale", "flip", "none"]

PUBLISHED_BATCH = 16  # 8 GPUs with 2 images each
UNDECAYED = ("level_embed", "pos_embed", "cls_token", "reg_token")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Hyperparameters of a training run; ``published`` returns the paper's for a row.

    Attributes:
        epochs: passes over the training images; 12 (1x) or 36 (3x) in the paper.
        schedule: ``"step"`` divides the learning rate by 10 at each milestone, as published;
            ``"cosine"`` reduces it to ``final_lr`` times itself (not in the paper).
        milestones: fractions of the epochs, 0..1.
        final_lr: where the cosine ends, relative to the learning rate.
        lr: learning rate of a batch of 16 images; 1e-4 (3x) or 2e-4 (1x) in the paper.
        betas: of AdamW.
        weight_decay: of AdamW. Norms, biases, position and level embeddings and layer scales
            have none.
        layer_decay: factor of the learning rate from block to block, or None.
        warmup: iterations of the linear warm-up, at most a tenth of the run.
        warmup_ratio: where the warm-up begins, relative to the learning rate.
        clip: largest norm of the gradient; None, as published, does not clip.
        augment: ``"multi-scale"`` (3x+MS), ``"flip"`` (1x) or ``"none"``.
        ema: decay of the moving average of the weights; None, as published, keeps none.
    """

    epochs: int = 36
    schedule: Schedule = "step"
    milestones: tuple[float, ...] = (27 / 36, 33 / 36)
    final_lr: float = 0.01
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.05
    layer_decay: float | None = None
    warmup: int = 500
    warmup_ratio: float = 1e-3
    clip: float | None = None
    augment: Augment = "multi-scale"
    ema: float | None = None

    def scaled(self, batch: int) -> Recipe:
        """The recipe for ``batch`` images per step: the learning rate follows it linearly."""
        return replace(self, lr=self.lr * batch / PUBLISHED_BATCH)

    def lr_factor(self, step: int, total: int, progress: float | None = None) -> float:
        """The learning rate of a step relative to ``lr``.

        Args:
            step: optimizer step, from 0.
            total: optimizer steps of the whole run.
            progress: how much of the run is over, 0..1; ``step / total`` by default. A run with
                a time limit is further than its steps say.
        """
        progress = step / total if progress is None else progress
        if self.schedule == "cosine":
            falling = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
            factor = self.final_lr + (1 - self.final_lr) * falling
        else:
            # Half a step of tolerance: 27/36 of the steps is not always a whole number in floats.
            factor = 0.1 ** sum(progress >= at - 0.5 / total for at in self.milestones)
        warmup = min(self.warmup, max(1, total // 10))
        if step < warmup:
            factor *= 1 - (1 - step / warmup) * (1 - self.warmup_ratio)
        return factor


def published(row: Row) -> Recipe:
    """The recipe that the row was trained with, for a batch of 16."""
    if row.schedule == "1x":
        return Recipe(
            epochs=12,
            milestones=(8 / 12, 11 / 12),
            lr=2e-4,
            weight_decay=0.01,
            augment="flip",
        )
    return Recipe(layer_decay=layer_decay.PUBLISHED.get(row.pretraining_name))


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Parameters with one learning rate and one weight decay together, for AdamW.

    Each group has ``lr_scale``, by which the schedule's learning rate is multiplied. A parameter
    at depth d of a trunk of N blocks learns at ``layer_decay ** (N + 1 - d)``.

    Args:
        model: a detector; its frozen parameters are left out.
        recipe: gives learning rate, weight decay and layer decay.
    """
    numbers = [layer_decay.block_of(name) for name, _ in model.named_parameters()]
    blocks = max((number for number in numbers if number is not None), default=-1) + 1
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and not any(word in name for word in UNDECAYED)
        depth = layer_decay.depth_of(name, blocks) if recipe.layer_decay is not None else blocks + 1
        if (depth, decays) not in groups:
            scale = (recipe.layer_decay or 1.0) ** (blocks + 1 - depth)
            groups[depth, decays] = {
                "params": [],
                "lr": recipe.lr * scale,
                "lr_scale": scale,
                "weight_decay": recipe.weight_decay if decays else 0.0,
            }
        groups[depth, decays]["params"].append(parameter)
    return list(groups.values())
