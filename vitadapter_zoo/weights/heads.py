"""Heads for other classes: classes of the same name keep their weights, others get random ones."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# Parameters with rows for each class: rows for a class, whether a row for the background follows,
# and the standard deviation of fresh weights as the original draws them (None: Kaiming, fan out).
CLASS_ROWS: dict[str, tuple[int, bool, float | None]] = {
    "roi_head.bbox_head.fc_cls": (1, True, 0.01),
    "roi_head.bbox_head.fc_reg": (4, False, 0.001),
    "roi_head.mask_head.conv_logits": (1, False, None),
}


def for_classes(
    tensors: Mapping[str, Tensor], old: Sequence[str], new: Sequence[str]
) -> dict[str, Tensor]:
    """Return the weights of a detector with other classes.

    Args:
        tensors: a detector's state dict.
        old: its classes.
        new: the classes wanted. Those of ``old`` keep their rows in every head, and so does the
            background; the others are drawn as for training from scratch, always the same.

    Returns:
        The new state dict; everything but the last layers of the heads is shared with
        ``tensors``.
    """
    places = {name: index for index, name in enumerate(old)}
    generator = torch.Generator("cpu").manual_seed(0)
    result = dict(tensors)
    for name, (rows, background, deviation) in CLASS_ROWS.items():
        weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        count = len(new) * rows + background
        fan_out = count * weight[0, 0].numel() if weight.ndim > 2 else count
        spread = deviation if deviation is not None else (2 / fan_out) ** 0.5
        shape = (count, *weight.shape[1:])
        drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * spread
        fresh, zeros = drawn.to(weight.device, weight.dtype), bias.new_zeros(count)
        for index, category in enumerate(new):
            if category in places:
                here, there = index * rows, places[category] * rows
                fresh[here : here + rows] = weight[there : there + rows]
                zeros[here : here + rows] = bias[there : there + rows]
        if background:
            fresh[-1], zeros[-1] = weight[-1], bias[-1]
        result |= {f"{name}.weight": fresh, f"{name}.bias": zeros}
    return result
