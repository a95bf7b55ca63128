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
EMBEDDINGS = ("patch_embed.", "pos_embed", "visual_embed.", "cls_token", "reg_token", "norm_pre.")
BLOCKS = ("blocks.", "layers.")
# Where the trunk's parameters are: in our own backbones, and in an adapter around a timm model.
TRUNKS = ("backbone.backbone.", "backbone.")


def block_of(name: str) -> int | None:
    """The number of the trunk's block that a parameter belongs to; None outside of the blocks."""
    inner = _in_trunk(name)
    return int(inner.split(".")[1]) if inner.startswith(BLOCKS) else None


def depth_of(name: str, blocks: int) -> int:
    """0 for the embeddings, 1 + N for block N, ``blocks`` + 1 for everything after the blocks."""
    if _in_trunk(name).startswith(EMBEDDINGS):
        return 0
    block = block_of(name)
    return blocks + 1 if block is None else block + 1


def _in_trunk(name: str) -> str:
    """A parameter's name within the trunk; empty for parameters outside of the backbone."""
    for prefix in TRUNKS:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return ""
