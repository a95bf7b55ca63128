"""The paper's adapter around timm's vision transformers."""

import copy
from typing import Any

import pytest
import standins
import timm
import torch
import trunks
from torch import Tensor

from vitadapter_zoo import ConfigError, ViTAdapter, get_row
from vitadapter_zoo.errors import ImageError
from vitadapter_zoo.models import TimmViTAdapter
from vitadapter_zoo.models.build import build_backbone

SIDES = (96, 160)


def images() -> Tensor:
    return torch.randn(2, 3, *SIDES, generator=torch.Generator().manual_seed(1))


def around(name: str, *, dynamic: bool = True, **settings: Any) -> TimmViTAdapter:
    return ViTAdapter.from_timm(trunks.tiny(name, dynamic_img_size=dynamic), **settings).eval()


def timms_own(name: str) -> Any:
    """The same trunk, created by timm for patches of 16 pixels and images of any size."""
    other = trunks.tiny(name)
    grid = other.patch_embed.grid_size[0]
    own = trunks.fresh(name, patch_size=16, img_size=16 * grid, dynamic_img_size=True)
    translate = __import__(type(own).__module__, fromlist=["x"]).checkpoint_filter_fn
    own.load_state_dict(translate(other.state_dict(), own))
    return own.eval()


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        *[(name, True) for name in trunks.ARCHITECTURES],
        ("vit_base_patch16_siglip_224", False),
        ("eva02_tiny_patch14_224", False),
        ("vit_small_patch16_rope_mixed_224", False),
    ],
)
@torch.no_grad()
def test_a_fresh_adapter_leaves_the_trunk_s_tokens(name: str, dynamic: bool) -> None:
    network = around(name, dynamic=dynamic)
    expected = timms_own(name).forward_features(images())
    tokens = network.forward_features(images())
    assert tokens.shape == expected.shape == (2, network.backbone.num_prefix_tokens + 60, 64)
    assert (tokens - expected).abs().max() <= 1e-6 * expected.abs().max()
    for injector in [part.injector for part in network.interactions]:
        injector.gamma.fill_(0.1)  # type: ignore[operator,union-attr]
    changed = network.forward_features(images())
    assert (changed - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("name", trunks.ARCHITECTURES)
def test_maps_and_gradients(name: str) -> None:
    network = around(name).train()
    maps = network(images())
    strides = network.feature_info.reduction()
    assert strides == [4, 8, 16, 32]
    assert [list(level.shape) for level in maps] == [
        [2, 64, SIDES[0] // stride, SIDES[1] // stride] for stride in strides
    ]
    sum(level.square().mean() for level in maps).backward()
    lacking = [name for name, x in network.named_parameters() if x.requires_grad and x.grad is None]
    assert lacking == []


@torch.no_grad()
def test_images_of_several_sizes_do_not_disturb_each_other() -> None:
    """Timm's rotary embeddings of a fixed size are kept and would be used for every size."""
    network = around("eva02_tiny_patch14_224", dynamic=False)
    expected = network(images())
    network(torch.randn(1, 3, 64, 64))
    for first, second in zip(network(images()), expected, strict=True):
        assert torch.equal(first, second)


@torch.no_grad()
def test_computes_what_the_published_arrangement_computes() -> None:
    """The row's own network, and timm's DeiT without a class token in the published windows."""
    row = get_row("adapter-t-deit-3x")
    with torch.device("meta"):
        ours = build_backbone(row)
    weights = {
        name.removeprefix("backbone."): x
        for name, x in standins.state_dict(row.name).items()
        if name.startswith("backbone.")
    }
    # timm interpolates position embeddings with other bicubic weights than the published code.
    weights["pos_embed"].zero_()
    ours.load_state_dict(weights, assign=True)
    vit = timm.create_model(
        "deit_tiny_patch16_224",
        class_token=False,
        global_pool="avg",
        fc_norm=False,
        init_values=1.0,
    )
    theirs = ViTAdapter.from_timm(vit, windows=True)
    assert theirs.windows == (True, True, False) * 4
    renamed = {}
    for name, value in weights.items():
        if name == "pos_embed":
            value = value[:, 1:]
        name = name.replace(".gamma1", ".ls1.gamma").replace(".gamma2", ".ls2.gamma")
        trunk = name.startswith(("blocks.", "patch_embed.", "pos_embed"))
        renamed["backbone." + name if trunk else name] = value
    for name in ("backbone.norm.weight", "backbone.norm.bias"):
        renamed[name] = theirs.state_dict()[name]
    theirs.load_state_dict(renamed)
    image = torch.randn(2, 3, 256, 416)
    for level, expected in zip(theirs.eval()(image), ours.eval()(image), strict=True):
        assert (level - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "name",
    ["deit_small_patch16_224", "vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3_qkvb",
     "eva02_tiny_patch14_224", "vit_small_patch14_reg4_dinov2"],
)  # fmt: skip
@torch.no_grad()
def test_a_window_as_large_as_the_image_is_global(name: str) -> None:
    image = torch.randn(2, 3, 224, 224)  # 14 x 14 patches
    windowed = around(name, windows=[True] * 4).forward_features(image)
    expected = around(name).forward_features(image)
    assert (windowed - expected).abs().max() <= 1e-5 * expected.abs().max()
    wider = torch.randn(1, 3, 224, 256)
    windowed = around(name, windows=[True] * 4).forward_features(wider)
    expected = around(name).forward_features(wider)
    assert (windowed - expected).abs().max() > 1e-3 * expected.abs().max()


def test_windows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="windows has 3 flags for 4 blocks"):
        around("deit_small_patch16_224", windows=[True] * 3)
    with pytest.raises(ConfigError, match=r"ParallelThingsBlock .* cannot be windowed"):
        around("vit_small_patch16_18x2_224", windows=[True] * 4)
    around("vit_small_patch16_18x2_224")


def test_depths_that_are_no_multiple_of_four_are_divided() -> None:
    network = ViTAdapter.from_timm(
        trunks.tiny("vit_so400m_patch14_siglip_224", depth=7, img_size=224), windows=True
    ).eval()
    assert network.windows == (False, True, False, True, False, True, False)
    assert len(network(images())) == 4


def test_deformable_attention_is_the_published_sizes() -> None:
    for dim, heads, expected in ((192, 3, (6, 192)), (384, 6, (6, 384)), (768, 12, (12, 384)),
                                 (1024, 16, (16, 512)), (1152, 16, (16, 576))):  # fmt: skip
        with torch.device("meta"):
            vit = trunks.fresh("deit_small_patch16_224", embed_dim=dim, num_heads=heads)
            network = ViTAdapter.from_timm(vit)
        attention: Any = network.interactions[0].injector.attn  # type: ignore[union-attr]
        assert (attention.heads, attention.value_proj.out_features) == expected


def test_a_frozen_trunk_has_no_gradients() -> None:
    network = around("vit_small_patch14_reg4_dinov2", frozen=True).train()
    assert not network.backbone.training
    network(images())[0].sum().backward()
    assert all(x.grad is None for x in network.backbone.parameters())
    injector: Any = network.interactions[1].injector  # its gradient passes through the trunk
    assert injector is not None
    assert injector.gamma.grad.abs().sum() > 0


def test_copies_and_saves(tmp_path: Any) -> None:
    network = around("eva02_tiny_patch14_224")
    torch.save(network.state_dict(), tmp_path / "network.pth")
    other = around("eva02_tiny_patch14_224")
    other.load_state_dict(torch.load(tmp_path / "network.pth"))
    with torch.no_grad():
        for first, second, third in zip(
            network(images()), other(images()), copy.deepcopy(network)(images()), strict=True
        ):
            assert torch.equal(first, second)
            assert torch.equal(first, third)


@pytest.mark.parametrize(
    "name",
    ["resnet18", "swin_tiny_patch4_window7_224", "vit_base_r50_s16_224", "beit_base_patch16_224"],
)
def test_other_kinds_are_refused(name: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name)
    with pytest.raises(ConfigError, match=r"does not fit: .* plain vision transformer of timm"):
        ViTAdapter.from_timm(network)


def test_other_trunks_and_images_are_refused() -> None:
    for settings in ({"depth": 3}, {"in_chans": 1}):
        with pytest.raises(ConfigError, match="at least four blocks and three input channels"):
            ViTAdapter.from_timm(trunks.tiny("deit_small_patch16_224", **settings))
    with pytest.raises(ConfigError, match="heads do not divide"):
        around("deit_small_patch16_224", deform_heads=7)
    with pytest.raises(ImageError, match="multiples of 32"):
        around("deit_small_patch16_224")(torch.zeros(1, 3, 64, 72))
