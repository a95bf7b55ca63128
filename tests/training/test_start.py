"""What training starts from: fresh weights, pretrained trunks, trained detectors."""

import math
import struct
import zipfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from vitadapter_zoo import CheckpointError, DownloadError, get_row
from vitadapter_zoo.models import build
from vitadapter_zoo.training.start import carry_over, initialize, starting_model
from vitadapter_zoo.weights.pretraining import read_pretraining

DEIT = "deit_tiny_patch16_224-a1311bcf.pth"


def test_fresh_weights_are_drawn_as_the_original_draws_them() -> None:
    model = build(get_row("adapter-n-emoji"))
    initialize(model, 3)
    state = model.state_dict()
    again = build(get_row("adapter-n-emoji"))
    initialize(again, 3)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in state.items())

    def deviation(name: str) -> float:
        return float(state[name].std())

    assert deviation("rpn_head.rpn_conv.weight") == pytest.approx(0.01, rel=0.05)
    assert deviation("roi_head.bbox_head.fc_cls.weight") == pytest.approx(0.01, rel=0.05)
    assert deviation("roi_head.bbox_head.fc_reg.weight") == pytest.approx(0.001, rel=0.05)
    assert deviation("backbone.blocks.0.mlp.fc1.weight") == pytest.approx(0.02, rel=0.05)
    convolution = state["backbone.spm.conv2.0.weight"]
    fan_out = convolution.shape[0] * 9
    assert float(convolution.std()) == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
    for name, value in state.items():
        if name.endswith(("bias", "injector.gamma")) and "sampling_offsets" not in name:
            assert not value.any(), name
        if name.endswith(("gamma1", "gamma2", "norm1.weight")):
            assert (value == 1).all(), name


def test_every_head_looks_in_a_direction_of_its_own() -> None:
    model = build(get_row("adapter-n-emoji"))
    initialize(model)
    attention: Any = model.get_submodule("backbone.interactions.0.injector.attn")
    assert not attention.sampling_offsets.weight.any()
    assert not attention.attention_weights.weight.any()
    offsets = attention.sampling_offsets.bias.view(6, 3, 4, 2)  # heads, levels, points, (x, y)
    for head in range(6):
        angle = 2 * math.pi * head / 6
        longest = max(abs(math.cos(angle)), abs(math.sin(angle)))
        for point in range(4):
            expected = [(point + 1) * f(angle) / longest for f in (math.cos, math.sin)]
            for level in range(3):
                found = offsets[head, level, point].tolist()
                assert found == pytest.approx(expected, abs=1e-5)


def deit(path: Path, side: int = 14) -> dict[str, Tensor]:
    """A file of DeiT's form, with random values."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        network = build(get_row("adapter-t-deit-3x")).backbone
    tensors = {
        name: torch.randn(value.shape, generator=generator)
        for name, value in network.state_dict().items()
        if name.startswith(("patch_embed", "blocks")) and "gamma" not in name
    }
    tensors["pos_embed"] = torch.randn(1, 1 + side**2, 192, generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": {**tensors, "head.bias": torch.zeros(1000)}}, path)
    return tensors


def test_the_published_pretraining(zoo_home: Path) -> None:
    tensors = deit(zoo_home / "pretraining" / DEIT)
    model, line = starting_model("adapter-t-deit-3x", "pretraining", ("a", "b"), offline=True)
    assert line == "trunk of DeiT-T, all other weights random"
    state = model.backbone.state_dict()
    assert all(torch.equal(state[name], value) for name, value in tensors.items())
    assert not state["interactions.0.injector.gamma"].any()
    assert model.roi_head.bbox_head.fc_cls.out_features == 3


def test_positions_of_another_grid_are_resized(zoo_home: Path) -> None:
    """Smooth positions stay what they are at the same place."""
    path = zoo_home / "pretraining" / DEIT
    deit(path, side=24)
    content = torch.load(path)

    def ramp(side: int) -> Tensor:
        centres = (torch.arange(side) + 0.5) / side
        return centres.repeat(side)[None, :, None].expand(1, -1, 192)

    content["model"]["pos_embed"] = torch.cat([torch.full((1, 1, 192), 7.0), ramp(24)], dim=1)
    torch.save(content, path)
    model, _ = starting_model("adapter-t-deit-3x", "pretraining", ("a",), offline=True)
    found = model.backbone.state_dict()["pos_embed"]
    assert (found[:, 0] == 7).all()
    inner = found[0, 1:].view(14, 14, 192)[:, 2:-2]
    expected = ramp(14)[0].view(14, 14, 192)[:, 2:-2]
    assert torch.allclose(inner, expected, atol=0.01)


def test_pretraining_that_cannot_be_had(zoo_home: Path) -> None:
    with pytest.raises(DownloadError, match="offline"):
        starting_model("adapter-t-deit-3x", "pretraining", ("a",), offline=True)
    with pytest.raises(CheckpointError, match="adapter-n-emoji has no pretraining"):
        starting_model("adapter-n-emoji", "pretraining", ("a",))
    path = zoo_home / "pretraining" / DEIT
    path.parent.mkdir(parents=True)
    torch.save({"model": {"fc.weight": torch.zeros(3, 3)}}, path)
    with pytest.raises(CheckpointError, match="not the pretraining of this backbone"):
        starting_model("adapter-t-deit-3x", "pretraining", ("a",), offline=True)


def jax(path: Path, dim: int, heads: int, depth: int, side: int) -> None:
    """A file of AugReg's form, with random values."""
    generator = np.random.default_rng(0)
    width = dim // heads
    shapes = {
        "cls": (1, 1, dim),
        "embedding/kernel": (16, 16, 3, dim),
        "embedding/bias": (dim,),
        "Transformer/posembed_input/pos_embedding": (1, 1 + side**2, dim),
        "Transformer/encoder_norm/scale": (dim,),
        "Transformer/encoder_norm/bias": (dim,),
    }
    for block in range(depth):
        name = f"Transformer/encoderblock_{block}"
        attention = f"{name}/MultiHeadDotProductAttention_1"
        for part in ("query", "key", "value"):
            shapes[f"{attention}/{part}/kernel"] = (dim, heads, width)
            shapes[f"{attention}/{part}/bias"] = (heads, width)
        shapes[f"{attention}/out/kernel"] = (heads, width, dim)
        shapes[f"{attention}/out/bias"] = (dim,)
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes[f"{name}/{norm}/scale"] = shapes[f"{name}/{norm}/bias"] = (dim,)
        for layer, (narrow, wide) in enumerate(((dim, 4 * dim), (4 * dim, dim))):
            shapes[f"{name}/MlpBlock_3/Dense_{layer}/kernel"] = (narrow, wide)
            shapes[f"{name}/MlpBlock_3/Dense_{layer}/bias"] = (wide,)
    arrays = {
        name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    np.savez(path, **cast("dict[str, Any]", arrays))


def test_augreg_s_arrays_give_what_timm_reads_from_them(tmp_path: Path) -> None:
    from timm.models.vision_transformer import VisionTransformer

    row = get_row("adapter-t-deit-3x")
    network = build(row).backbone
    path = tmp_path / "augreg.npz"
    jax(path, 192, 3, 12, 14)
    read_pretraining(network, str(path))
    oracle = VisionTransformer(img_size=224, embed_dim=192, depth=12, num_heads=3, num_classes=0)
    oracle.load_pretrained(str(path))
    theirs, ours = oracle.state_dict(), network.state_dict()
    compared = [name for name in theirs if name in ours and name.startswith(("patch", "blocks"))]
    assert len(compared) == 2 + 12 * 12
    assert all(torch.equal(theirs[name], ours[name]) for name in compared)
    assert torch.equal(ours["pos_embed"], theirs["pos_embed"])
    assert timm.__version__


def test_damaged_arrays_are_refused(tmp_path: Path) -> None:
    network = build(get_row("adapter-t-deit-3x")).backbone
    path = tmp_path / "other.npz"
    np.savez(path, weights=np.zeros(3))
    with pytest.raises(CheckpointError, match="not a vision transformer of JAX's"):
        read_pretraining(network, str(path))
    vast: dict[str, Any] = {"embedding/kernel": np.zeros(50_000_000, np.uint8)}
    np.savez_compressed(path, **vast)
    with pytest.raises(CheckpointError, match="claim 50,000,128 bytes"):
        read_pretraining(network, str(path))
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "embedding/kernel.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
        )
    with pytest.raises(CheckpointError, match="claim 4,000,000,000,000 bytes"):
        read_pretraining(network, str(path))
    np.savez(path, **{"embedding/kernel": np.array([{}], dtype=object)}, allow_pickle=True)
    with pytest.raises(CheckpointError, match="Object arrays cannot be loaded"):
        read_pretraining(network, str(path))


def test_heads_follow_the_names_of_the_classes() -> None:
    row = get_row("adapter-n-emoji")
    old, new = build(row, ("cat", "dog", "horse")), build(row, ("emu", "horse", "cat"))
    initialize(old, 1)
    initialize(new, 2)
    assert carry_over(old, new, "old") == (
        "weights of old; heads kept for horse, cat; fresh heads for emu"
    )
    drawn = new.state_dict()["roi_head.bbox_head.fc_cls.weight"][0]
    assert float(drawn.std()) == pytest.approx(0.01, rel=0.3)
    heads = "roi_head.bbox_head.fc_cls.weight", "roi_head.mask_head.conv_logits.bias"
    for name in heads:
        a, b = old.state_dict()[name], new.state_dict()[name]
        assert torch.equal(b[1], a[2])
        assert torch.equal(b[2], a[0])
    name = "roi_head.bbox_head.fc_reg.weight"
    assert torch.equal(new.state_dict()[name][4:8], old.state_dict()[name][8:12])
    name = "roi_head.bbox_head.fc_cls.bias"
    assert torch.equal(new.state_dict()[name][-1], old.state_dict()[name][-1])
    name = "backbone.spm.fc1.weight"
    assert torch.equal(new.state_dict()[name], old.state_dict()[name])
    other = build(get_row("adapter-t-deit-3x"))
    with pytest.raises(CheckpointError, match="another network than adapter-n"):
        carry_over(other, new, "adapter-t-deit-3x")
