"""How many images a GPU computes together, chosen by its free memory."""

from __future__ import annotations

import torch

from vitadapter_zoo.images import NetworkInput, padded_side
from vitadapter_zoo.models import MaskRCNN

SIZES = (8, 4, 2, 1)  # more than eight images are not faster
# Of an image's memory: the activations, and as much again for the maps that CUDA graphs keep.
SHARE_OF_FREE = 0.4


def chosen_size(model: MaskRCNN) -> int:
    """Return the batch size for a detector where it is; 1 on the CPU, where no batch is faster."""
    if next(model.parameters()).device.type != "cuda":
        return 1
    return size_that_fits(free_bytes(model), bytes_per_image(model))


def size_that_fits(free: int, per_image: int) -> int:
    """Return the largest batch size that leaves room for CUDA graphs; at least 1.

    Args:
        free: memory in bytes.
        per_image: memory in bytes that one image needs.
    """
    return next((n for n in SIZES if n * per_image <= SHARE_OF_FREE * free), 1)


def free_bytes(model: MaskRCNN) -> int:
    """Return the memory that is free on the detector's GPU, with what PyTorch keeps unused."""
    device = next(model.parameters()).device
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def bytes_per_image(model: MaskRCNN) -> int:
    """Measure on the GPU how much memory the largest image of the detector's row needs."""
    device = next(model.parameters()).device
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with torch.inference_mode():
        model.detect([largest_input(model)])
    return torch.cuda.max_memory_allocated(device) - before


def largest_input(model: MaskRCNN) -> NetworkInput:
    """Return a grey image whose padded shape is the largest that ``preprocess`` gives."""
    longest, shortest = model.row.input_size
    size = (padded_side(shortest), padded_side(longest))
    return NetworkInput(torch.zeros(1, 3, *size), size, size, (1.0, 1.0, 1.0, 1.0))
