"""Layer-wise learning rate decay (BEiT, arXiv:2106.08254): the depth of each parameter.

A parameter at depth d of a trunk with N blocks learns at ``rate ** (N + 1 - d)`` of the full rate.
"""

# Published rates by pretraining; the other rows were trained without decay.
PUBLISHED = {
    "AugReg-L": 0.80,
    "Uni-Perceiver-B": 0.65,
    "DINOv2-S": 0.70,
    "DINOv2-B": 0.70,
    "DINOv2-L": 0.80,
}
EMBEDDINGS = ("backbone.patch_embed.", "backbone.pos_embed", "backbone.visual_embed.")
BLOCKS = ("backbone.blocks.", "backbone.layers.")


def depth_of(name: str, blocks: int) -> int:
    """0 for the embeddings, 1 + N for block N, ``blocks`` + 1 for everything after the blocks."""
    if name.startswith(EMBEDDINGS):
        return 0
    if name.startswith(BLOCKS):
        return int(name.split(".")[2]) + 1
    return blocks + 1
