"""Backbones for other people's models: by name, through timm, torchvision and smp."""

import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import segmentation_models_pytorch as smp
import timm
import torch
import trunks
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork

import vitadapter_zoo
from vitadapter_zoo import (
    CheckpointError,
    ConfigError,
    DINOv3Adapter,
    DownloadError,
    MaskRCNN,
    UnknownModelError,
)
from vitadapter_zoo.models import TimmViTAdapter

NANO = "adapter-n-emoji"
SMALL = "vit_small_patch16_dinov3_qkvb"


def test_a_row_gives_its_own_backbone(published_file: object, tiny: MaskRCNN) -> None:
    path = published_file("adapter-t-deit-3x")  # type: ignore[operator]
    network = vitadapter_zoo.backbone("adapter-t-deit-3x", checkpoint=path, progress=False)
    assert not network.training
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        for ours, expected in zip(network(image), tiny.backbone(image), strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", [NANO, "vit-t-deit-3x"])
def test_maps_are_described_and_chosen(name: str) -> None:
    image = torch.randn(1, 3, 64, 96)
    whole = vitadapter_zoo.backbone(name, pretrained=False)
    chosen = vitadapter_zoo.backbone(name, pretrained=False, out_indices=(1, -1))
    chosen.load_state_dict(whole.state_dict())
    width = 96 if name == NANO else 192
    assert whole.feature_info.channels() == [width] * 4  # type: ignore[operator,union-attr]
    assert chosen.feature_info.reduction() == [8, 32]  # type: ignore[operator,union-attr]
    with torch.no_grad():
        maps = whole(image)
        assert [list(level.shape[2:]) for level in maps] == [[16, 24], [8, 12], [4, 6], [2, 3]]
        for ours, expected in zip(chosen(image), (maps[1], maps[3]), strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("wrong", [(), (4,), (1, 0), (0, 0), (-5,)])
def test_other_indices_are_refused(wrong: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="give ascending indices of the four maps"):
        vitadapter_zoo.backbone(NANO, pretrained=False, out_indices=wrong)


def test_a_timm_name_gets_the_adapter_that_is_asked_for() -> None:
    with torch.device("meta"):
        paper = vitadapter_zoo.backbone(
            f"timm/{SMALL}.lvd1689m", pretrained=False, windows=True, drop_path=0.2
        )
        dinov3 = vitadapter_zoo.backbone(SMALL, adapter="dinov3", pretrained=False, frozen=False)
    assert isinstance(paper, TimmViTAdapter)
    assert paper.windows == (True, True, False) * 4
    assert paper.backbone.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert isinstance(dinov3, DINOv3Adapter)
    assert all(x.requires_grad for x in dinov3.parameters())


def test_names_and_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    backbone = vitadapter_zoo.backbone
    with pytest.raises(UnknownModelError, match="did you mean adapter-s-deit-3x"):
        backbone("adapter-s-deit-3")
    with pytest.raises(UnknownModelError, match="vit_small_patch16_dinov3"):
        backbone("timm/vit_smal_patch16_dinov3", pretrained=False)
    with pytest.raises(ConfigError, match=r"resnet18 does not fit: .* plain vision transformer"):
        backbone("resnet18", pretrained=False)
    with pytest.raises(ConfigError, match="must be one of 'paper' and 'dinov3'"):
        backbone(SMALL, adapter="dinov2", pretrained=False)
    with pytest.raises(ConfigError, match="leave windows out"), torch.device("meta"):
        backbone(SMALL, adapter="dinov3", windows=True, pretrained=False)
    with pytest.raises(ConfigError, match="has a backbone of its own"):
        backbone(NANO, adapter="dinov3")
    with pytest.raises(ConfigError, match="leave one of them out"):
        backbone(SMALL, checkpoint=tmp_path / "weights.pth", pretrained=True)
    with pytest.raises(CheckpointError, match="there is no checkpoint file"):
        backbone(SMALL, checkpoint=tmp_path / "weights.pth")


def test_offline_timm_s_weights_come_from_the_hub_s_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        DownloadError, match=r"timm/vit_tiny_patch16_224.* is not in .* checkpoint="
    ):
        vitadapter_zoo.backbone("vit_tiny_patch16_224", offline=True)
    folder = tmp_path / "models--timm--vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    trunk: Any = timm.create_model("vit_tiny_patch16_224")
    file = folder / "snapshots" / ("0" * 40) / "model.safetensors"
    safetensors.torch.save_file(trunk.state_dict(), file)
    network = vitadapter_zoo.backbone("timm/vit_tiny_patch16_224", offline=True)
    state = network.state_dict()
    assert torch.equal(state["backbone.blocks.3.mlp.fc1.weight"], trunk.blocks[3].mlp.fc1.weight)


def test_timm_knows_the_backbones() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # timm warns when a name is registered again
        names = vitadapter_zoo.register_timm()
        assert vitadapter_zoo.register_timm() == names
    assert "adapter_s_deit_3x" in timm.list_models("adapter_*")
    network: Any = timm.create_model("adapter_n_emoji", features_only=True, out_indices=(0, 2))
    assert network.training
    assert network.feature_info.reduction() == [4, 16]
    assert [level.shape[2] for level in network(torch.randn(2, 3, 64, 64))] == [16, 4]
    with torch.device("meta"):
        large = timm.create_model("adapter_l_augreg_3x", features_only=True)
    normalised = resolve_model_data_config(large)  # type: ignore[no-untyped-call]
    assert normalised["mean"] == (0.5, 0.5, 0.5)
    with pytest.raises(ConfigError, match="no classifier: create it with features_only=True"):
        timm.create_model("adapter_n_emoji")
    with pytest.raises(ConfigError, match="without output_stride"):
        timm.create_model("adapter_n_emoji", features_only=True, output_stride=16)


class WithPyramid(nn.Module):
    """A backbone in the form that torchvision's detectors accept."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.out_channels = 32
        self.body = body
        channels = body.feature_info.channels()  # type: ignore[operator,union-attr]
        self.fpn = FeaturePyramidNetwork(channels, self.out_channels)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict(zip("0123", self.body(image), strict=True)))


def around_a_tiny_trunk() -> nn.Module:
    return DINOv3Adapter(trunks.tiny(SMALL))


@pytest.mark.parametrize("kind", ["row", "dinov3"])
def test_torchvision_s_heads_learn_from_them(kind: str) -> None:
    torch.manual_seed(0)
    body = (
        vitadapter_zoo.backbone(NANO, pretrained=False) if kind == "row" else around_a_tiny_trunk()
    )
    detector = FasterRCNN(
        WithPyramid(body),
        num_classes=3,
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,), (128,)), ((1.0,),) * 4),
        min_size=128,
        max_size=160,
        size_divisible=32,
    ).train()
    images = [torch.rand(3, 128, 160), torch.rand(3, 128, 128)]
    boxes = torch.tensor([[10.0, 20.0, 70.0, 90.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([label])} for label in (1, 2)]
    optimizer = torch.optim.AdamW([x for x in detector.parameters() if x.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = sum(detector(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    gradients = [x.grad for name, x in body.named_parameters() if name.startswith("spm")]
    assert all(gradient is not None for gradient in gradients)
    assert losses[-1] < losses[0]


def test_segmentation_models_learn_from_them() -> None:
    torch.manual_seed(0)
    vitadapter_zoo.register_timm()
    model = smp.Unet("tu-adapter_n_emoji", encoder_weights=None, classes=2)
    image, wanted = torch.rand(2, 3, 64, 96), torch.randint(0, 2, (2, 64, 96))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(model(image), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_folders_of_detectors_are_taken(tmp_path: Path) -> None:
    detector = vitadapter_zoo.load(NANO, pretrained=False)
    vitadapter_zoo.save_pretrained(detector, tmp_path / "mine")
    network = vitadapter_zoo.backbone(tmp_path / "mine")
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(network(image)[3], detector.backbone(image)[3])
