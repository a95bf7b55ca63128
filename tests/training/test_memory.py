"""Memory of training: checkpointed blocks, and a device that is full."""

from pathlib import Path

import pytest
import torch
from quick_training import NANO

from vitadapter_zoo import ZooError, get_row
from vitadapter_zoo.models import MaskRCNN, build
from vitadapter_zoo.training.loop import out_of_memory
from vitadapter_zoo.training.memory import checkpoint_blocks
from vitadapter_zoo.training.start import initialize

pytestmark = pytest.mark.usefixtures("one_thread")


def gradients(model: MaskRCNN) -> list[torch.Tensor]:
    torch.manual_seed(0)
    maps = model.backbone(torch.randn(1, 3, 64, 64))
    sum(x.square().mean() for x in maps).backward()
    return [x.grad.clone() for x in model.backbone.parameters() if x.grad is not None]


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    model = build(get_row(NANO))
    initialize(model)
    model.train()
    kept = gradients(model)
    model.zero_grad()
    names = list(model.state_dict())
    assert checkpoint_blocks(model.backbone) == 8 + 4 + 6  # blocks, injectors, extractors
    assert list(model.state_dict()) == names
    again = gradients(model)
    assert len(kept) == len(again) > 200
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_checkpointed_blocks_keep_less(tmp_path: Path) -> None:
    """Bytes that autograd saves for the backward pass."""

    def saved(model: MaskRCNN) -> int:
        kept: dict[int, int] = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            maps = model.backbone(torch.randn(1, 3, 128, 128))
        assert maps[0].requires_grad
        parameters = {x.untyped_storage().data_ptr() for x in model.parameters()}
        return sum(size for place, size in kept.items() if place not in parameters)

    model = build(get_row(NANO)).train()
    before = saved(model)
    checkpoint_blocks(model.backbone)
    assert saved(model) < 0.4 * before


def test_a_full_device_names_what_to_change() -> None:
    with pytest.raises(
        ZooError, match=r"for 4 images at a time: use --batch-size 2 --accumulate 2"
    ):
        with out_of_memory(4):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    with pytest.raises(ZooError, match=r"for 1 images at a time: use --checkpoint-blocks"):
        with out_of_memory(1):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
