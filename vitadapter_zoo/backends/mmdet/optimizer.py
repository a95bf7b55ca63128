"""Layer-wise learning rate decay (BEiT, arXiv:2106.08254)."""

from typing import Any

from mmcv.runner import DefaultOptimizerConstructor
from torch import nn

from vitadapter_zoo.models.layer_decay import depth_of


class LayerDecayOptimizerConstructor(DefaultOptimizerConstructor):  # type: ignore[misc]
    """As in the original project: ``paramwise_cfg=dict(num_layers=24, layer_decay_rate=0.8)``.

    A parameter at depth d has the rate ``lr * layer_decay_rate ** (num_layers + 1 - d)``. Vectors
    (norms, biases, layer scales) have no weight decay.
    """

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **_: Any) -> None:
        """Append one group per depth and weight decay to ``params``."""
        blocks = self.paramwise_cfg["num_layers"]
        rate = self.paramwise_cfg["layer_decay_rate"]
        groups: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            depth, decays = depth_of(name, blocks), parameter.ndim > 1
            if (depth, decays) not in groups:
                scale = rate ** (blocks + 1 - depth)
                groups[depth, decays] = {
                    "params": [],
                    "param_names": [],
                    "lr_scale": scale,
                    "lr": scale * self.base_lr,
                    "weight_decay": self.base_wd if decays else 0.0,
                }
            groups[depth, decays]["params"].append(parameter)
            groups[depth, decays]["param_names"].append(name)
        params.extend(groups.values())
