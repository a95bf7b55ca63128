"""Setting up a run: device, processes, precision, frozen parameters and optimizer."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.models import MaskRCNN
from vitadapter_zoo.training.loop import Step
from vitadapter_zoo.training.memory import checkpoint_blocks
from vitadapter_zoo.training.recipe import Recipe, parameter_groups
from vitadapter_zoo.training.state import Average, frozen_trunk

if TYPE_CHECKING:
    from accelerate import Accelerator

MOST_WORKERS = 16


def accelerator_of(
    precision: Literal["no", "bf16"], device: str | None, accumulate: int
) -> Accelerator:
    """Devices, processes and precision of a run.

    Args:
        precision: ``"bf16"`` computes in bfloat16 where that is safe.
        device: None takes the best that is there; of several processes each has its own.
        accumulate: forward passes for each step.

    Raises:
        ZooError: accelerate is missing, or the device cannot be used.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise ZooError("training needs accelerate: pip install 'vitadapter-zoo[train]'") from error
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        # Accelerate keeps the first run's device and precision for the whole process.
        AcceleratorState._reset_state(reset_partial_state=True)
    with _chosen(device):
        return Accelerator(
            cpu=device == "cpu",
            mixed_precision=precision,
            gradient_accumulation_steps=accumulate,
        )


@contextlib.contextmanager
def _chosen(device: str | None) -> Iterator[None]:
    """While it is open, accelerate takes this device; it asks the environment, not its caller."""
    if device in (None, "cpu"):
        yield
        return
    assert device is not None  # noqa: S101  for the type checker
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ZooError(f"the device {device!r} cannot be used here: {reason}") from error
    before = os.environ.get("ACCELERATE_TORCH_DEVICE")
    os.environ["ACCELERATE_TORCH_DEVICE"] = device
    try:
        yield
    finally:
        if before is None:
            del os.environ["ACCELERATE_TORCH_DEVICE"]
        else:
            os.environ["ACCELERATE_TORCH_DEVICE"] = before


def freeze_parameters(model: MaskRCNN, prefixes: Sequence[str]) -> None:
    """Keep parameters from changing.

    Raises:
        ZooError: no parameter has a prefix, or none is left to train.
    """
    for prefix in prefixes:
        named = [x for name, x in model.named_parameters() if name.startswith(prefix)]
        if not named:
            first = sorted({name.partition(".")[0] for name, _ in model.named_parameters()})
            raise ZooError(
                f"no parameter's name begins with {prefix!r}: freeze {', '.join(first)}, or "
                "backbone.blocks, for instance"
            )
        for parameter in named:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ZooError("everything is frozen: leave something to train")


def prepared(
    accelerator: Accelerator, model: MaskRCNN, recipe: Recipe, checkpoint: bool
) -> tuple[nn.Module, Any, Average | None]:
    """The losses' module and the optimizer as the accelerator wraps them, and the average.

    Raises:
        ZooError: a setting of the recipe that a frozen trunk makes void.
    """
    if recipe.layer_decay is not None and frozen_trunk(model) is not None:
        raise ZooError(
            "--layer-decay lowers the learning rate of the trunk's blocks, and the trunk is "
            "frozen: leave it out, or train the trunk (--train-backbone)"
        )
    model.to(accelerator.device)
    average = None
    if recipe.ema is not None:
        # A frozen trunk has one value for both.
        trunk = frozen_trunk(model)
        shared = {} if trunk is None else {id(trunk): trunk}
        average = Average(model, copy.deepcopy(model, shared), recipe.ema)
    if checkpoint:
        checkpoint_blocks(model.backbone)
    on_gpu = accelerator.device.type == "cuda"
    optimizer = torch.optim.AdamW(
        parameter_groups(model, recipe), lr=recipe.lr, betas=recipe.betas, fused=on_gpu
    )
    net: nn.Module = Step(model)
    if on_gpu and accelerator.num_processes > 1:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    net, optimizer = accelerator.prepare(net, optimizer)
    return net, optimizer, average


def loader_workers(workers: int | None, accelerator: Accelerator) -> int:
    """Processes that prepare images; by default the cores are shared out, but for one."""
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(MOST_WORKERS, max(1, (cores or 1) // accelerator.num_processes - 1))
