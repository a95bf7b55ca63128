"""The backbones under the original's argument names; mmdet is not needed to build them."""

import copy
import hashlib
from pathlib import Path
from typing import Any

import pytest
import standins
import torch
from pytest_httpserver import HTTPServer
from torch import Tensor, nn

from vitadapter_zoo import ConfigError, get_row
from vitadapter_zoo.backends.mmdet import modules as modules
from vitadapter_zoo.backends.mmdet_config import mmdet_config
from vitadapter_zoo.catalog import MADE_HERE, PUBLISHED
from vitadapter_zoo.errors import CheckpointError
from vitadapter_zoo.models.build import build_backbone

IMAGE = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
TINY: dict[str, Any] = {"embed_dim": 96, "depth": 4, "num_heads": 3}


def backbone(row: str, **changes: Any) -> Any:
    """The row's backbone from its configuration, with other arguments where they are given."""
    arguments = {**mmdet_config(get_row(row))["model"]["backbone"], **changes}
    return getattr(modules, arguments.pop("type"))(**arguments)


def standin_backbone(row: str, **changes: Any) -> nn.Module:
    network: nn.Module = backbone(row, **changes)
    names = network.state_dict()
    network.load_state_dict({name: standins.tensor(f"backbone.{name}", list(value.shape))
                             for name, value in names.items()})  # fmt: skip
    return network.eval()


@pytest.mark.parametrize("name", [row.name for row in (*PUBLISHED, *MADE_HERE) if row.size != "L"])
def test_configuration_builds_the_backbone_of_the_catalog(name: str) -> None:
    with torch.device("meta"):
        ours, native = backbone(name), build_backbone(get_row(name))
    assert type(native) in type(ours).__mro__
    expected = {key: value.shape for key, value in native.state_dict().items()}
    if name == "adapter-t-deit-1x":
        expected = {key: shape for key, shape in expected.items() if "gamma" not in key[-6:]} | {
            key: shape for key, shape in expected.items() if key.endswith("injector.gamma")
        }
    assert {key: value.shape for key, value in ours.state_dict().items()} == expected
    rates = [module.drop_prob for module in ours.modules() if hasattr(module, "drop_prob")]
    assert rates == [m.drop_prob for m in native.modules() if hasattr(m, "drop_prob")]


WRONG = {
    "patch_size": 14,
    "in_chans": 4,
    "mlp_ratio": 3,
    "qkv_bias": False,
    "drop_rate": 0.1,
    "attn_drop_rate": 0.1,
    "img_size": 384,
    "n_points": 8,
    "with_cffn": False,
    "cffn_ratio": 0.5,
    "add_vit_feature": False,
    "interaction_indexes": [[0, 0], [1, 1], [2, 2], [3, 11]],
    "depth": 11,
    "window_attn": [True] * 11,
    "window_size": 7,
}


@pytest.mark.parametrize(("name", "value"), WRONG.items())
def test_unsupported_arguments_are_refused_by_name(name: str, value: object) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=name):
        backbone("adapter-t-deit-3x", **{name: value})


def test_out_indices_and_unknown_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="out_indices"):
        backbone("vit-t-deit-3x", out_indices=[3, 5, 7, 11])
    with pytest.raises(TypeError, match="interact_indexes"):
        backbone("adapter-t-deit-3x", interact_indexes=[])


def test_channel_mapper_accepts_the_original_arguments() -> None:
    published: dict[str, Any] = {"in_channels": [96] * 4, "out_channels": 256, "num_outs": 5}
    neck = modules.ChannelMapperWithPooling(**published)
    maps = [torch.randn(1, 96, side, side) for side in (16, 8, 4, 2)]
    assert [level.shape[2] for level in neck(maps)] == [16, 8, 4, 2, 1]
    for wrong in ({"out_channels": 128}, {"num_outs": None}, {"norm_cfg": {"type": "BN"}},
                  {"act_cfg": None}, {"in_channels": [96, 96, 96, 48]}):  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            modules.ChannelMapperWithPooling(**{**published, **wrong})
    neck.init_weights()
    assert not any(conv.conv.bias.any() for conv in neck.convs)  # type: ignore[union-attr,operator]


@torch.inference_mode()
def test_no_layer_scale_equals_layer_scale_of_ones() -> None:
    without = standin_backbone("vit-t-deit-3x", layer_scale=False)
    assert not any("gamma" in name for name in without.state_dict())
    with_ones = standin_backbone("vit-t-deit-3x")
    scales = {name: torch.ones(192) for name in with_ones.state_dict() if "gamma" in name}
    with_ones.load_state_dict({**without.state_dict(), **scales})
    for a, b in zip(without(IMAGE), with_ones(IMAGE), strict=True):
        assert torch.equal(a, b)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    def gradients(network: nn.Module) -> list[Tensor]:
        sum(level.square().mean() for level in network(IMAGE)).backward()
        return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]

    plain = modules.ViTAdapter(**TINY, deform_num_heads=3)
    recomputing = modules.ViTAdapter(**TINY, deform_num_heads=3, with_cp=True)
    recomputing.load_state_dict(plain.state_dict())
    calls = []
    for block in recomputing.blocks:
        block.attn.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    copied = copy.deepcopy(recomputing)
    expected = gradients(plain)
    for network in (recomputing, copied):
        for ours, theirs in zip(gradients(network), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert len(calls) == 2 * 2 * 4  # forward and again in the backward pass, in both


def test_training_arguments_of_the_adapter_have_an_effect() -> None:
    network = modules.ViTAdapter(
        **TINY, deform_num_heads=3, init_values=0.5, use_extra_extractor=False, drop_path_rate=0.3
    )
    state = network.state_dict()
    assert torch.equal(state["interactions.2.injector.gamma"], torch.full((96,), 0.5))
    assert not any("extra_extractors" in name for name in state)
    assert network.blocks[3].drop_path.drop_prob == pytest.approx(0.3)  # type: ignore[union-attr]
    assert network(IMAGE)[0].shape == (1, 96, 16, 24)


def pretraining(path: Path, network: nn.Module, **extra: Tensor) -> dict[str, Tensor]:
    """A DeiT-like file: the trunk under "model", beside parts of a classifier."""
    trunk = {
        name: torch.randn(value.shape)
        for name, value in network.state_dict().items()
        if name.startswith(("patch_embed", "pos_embed", "blocks")) and "gamma" not in name
    }
    torch.save({"model": {**trunk, "cls_token": torch.zeros(1, 1, 96), **extra}}, path)
    return trunk


def test_pretraining_is_read_when_training_starts(tmp_path: Path) -> None:
    path = tmp_path / "deit.pth"
    network = modules.ViTAdapter(**TINY, deform_num_heads=3, pretrained=str(path))  # not there yet
    trunk = pretraining(path, network)
    before = copy.deepcopy(network.state_dict())
    network.init_weights()
    for name, value in network.state_dict().items():
        assert torch.equal(value, trunk.get(name, before[name])), name


def test_dinov2_pretraining_is_resized_to_patches_of_16_pixels(tmp_path: Path) -> None:
    path = tmp_path / "dinov2.pth"
    network = modules.ViTAdapter(**TINY, deform_num_heads=3, pretrained=str(path))
    state = network.state_dict()
    trunk = {name: torch.randn(value.shape) for name, value in state.items()
             if name.startswith(("pos_embed", "blocks"))}  # fmt: skip
    # A kernel that rises linearly still does after the resizing, with the same centre.
    ramp = torch.arange(14.0) - 6.5
    kernel = ramp.expand(96, 3, 14, 14) * torch.randn(96, 3, 1, 1)
    theirs = {
        name.replace("gamma1", "ls1.gamma").replace("gamma2", "ls2.gamma"): value
        for name, value in trunk.items()
    }
    theirs |= {"patch_embed.proj.weight": kernel, "patch_embed.proj.bias": torch.randn(96)}
    torch.save({**theirs, "cls_token": torch.zeros(1, 1, 96), "mask_token": torch.zeros(96),
                "norm.weight": torch.ones(96), "norm.bias": torch.zeros(96)}, path)  # fmt: skip
    network.init_weights()
    after = network.state_dict()
    for name, value in trunk.items():
        assert torch.equal(after[name], value), name
    assert torch.equal(after["patch_embed.proj.bias"], theirs["patch_embed.proj.bias"])
    weight = after["patch_embed.proj.weight"]
    assert weight.shape == (96, 3, 16, 16)
    steps = weight[..., 1:15].diff(dim=-1)  # at the edges the kernel is continued by its border
    torch.testing.assert_close(steps, (kernel.diff(dim=-1)[..., :1, :1] * 14 / 16).expand_as(steps))
    torch.testing.assert_close(weight.flip(-1), -weight)


def test_other_pretraining_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deit.pth"
    network = modules.ViTBaseline(**TINY, pretrained=str(path))
    with pytest.raises(CheckpointError, match=r"no checkpoint file"):
        network.init_weights()
    pretraining(path, network, pos_embed=torch.zeros(1, 577, 96))
    with pytest.raises(CheckpointError, match=r"not the pretraining of this backbone.*pos_embed"):
        network.init_weights()


def test_pretraining_is_downloaded_once_and_checked(
    tmp_path: Path, zoo_home: Path, httpserver: HTTPServer
) -> None:
    network = modules.ViTBaseline(**TINY)
    trunk = pretraining(tmp_path / "file", network)
    content = (tmp_path / "file").read_bytes()
    name = f"deit-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    httpserver.expect_ordered_request(f"/{name}").respond_with_data(content)
    for _ in range(2):
        network = modules.ViTBaseline(**TINY, pretrained=httpserver.url_for(f"/{name}"))
        network.init_weights()
        assert torch.equal(network.pos_embed, trunk["pos_embed"])
    assert len(httpserver.log) == 1
    assert (zoo_home / "pretraining" / name).exists()
