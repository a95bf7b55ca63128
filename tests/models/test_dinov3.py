"""DINOv3's adapter against outputs of its authors' code, and the files that it is loaded from."""

import json
import logging
from pathlib import Path

import cv2
import helpers
import numpy as np
import pytest
import standins
import timm
import torch
import trunks
from operators import switched_to
from torch import Tensor

import vitadapter_zoo
from vitadapter_zoo import CheckpointError, ConfigError, DINOv3Adapter, UnsafeCheckpointError
from vitadapter_zoo.errors import ImageError

FOLDER = standins.DATA / "dinov3"
NAME = "vit_small_patch16_dinov3_qkvb"
IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
# Trunk, its four layers, width of the values.
SIZES = {
    "vit_small_patch16_dinov3_qkvb": ((2, 5, 8, 11), 192),
    "vit_small_plus_patch16_dinov3": ((2, 5, 8, 11), 192),
    "vit_base_patch16_dinov3.lvd1689m": ((2, 5, 8, 11), 384),
    "vit_large_patch16_dinov3_qkvb": ((4, 11, 17, 23), 512),
    "vit_huge_plus_patch16_dinov3": ((7, 15, 23, 31), 640),
    "vit_7b_patch16_dinov3": ((9, 19, 29, 39), 2048),
}


def contract() -> dict[str, list[int]]:
    names: dict[str, list[int]] = json.loads((FOLDER / "vits16.json").read_text())
    return names


def authors_file() -> dict[str, Tensor]:
    """Stand-in weights as ``../shared/reference/README.md`` says."""
    tensors = {name: standins.tensor(name, shape) for name, shape in contract().items()}
    for name, value in tensors.items():
        if name.endswith("bias_mask"):
            value.fill_(1).view(3, -1)[1] = 0
    periods = 100 ** (2 * torch.arange(16, dtype=torch.float32) / 32)
    return tensors | {"backbone.rope_embed.periods": periods}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> DINOv3Adapter:
    """ViT-S with the stand-in weights, from a file of the authors' form."""
    path = trunks.save(authors_file(), tmp_path_factory.mktemp("dinov3") / "authors.pth")
    network = vitadapter_zoo.backbone(NAME, adapter="dinov3", checkpoint=path, progress=False)
    assert isinstance(network, DINOv3Adapter)
    return network


def photo() -> Tensor:
    """The photo as the authors' code got it: ``[1, 3, 416, 640]``."""
    decoded = cv2.imread(str(standins.PHOTO))
    assert decoded is not None
    pixels = cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)[:416]
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    return (image - IMAGENET[0]) / IMAGENET[1]


def difference(stored: dict[str, np.ndarray], name: str, tensor: Tensor) -> float:
    """Largest difference of the sampled values, relative to the largest magnitude."""
    assert list(tensor.shape) == stored[f"{name}.shape"].tolist()
    found = tensor.detach().contiguous().flatten()[torch.from_numpy(stored[f"{name}.index"])]
    largest = stored[f"{name}.moments"][2]
    return float(np.abs(found.numpy() - stored[f"{name}.value"]).max() / largest)


@pytest.mark.parametrize(
    "operator", ["compiled", pytest.param("reference", marks=pytest.mark.slow)]
)
def test_agrees_with_the_authors_code(
    operator: str, small: DINOv3Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = dict(np.load(FOLDER / "vits16.npz"))
    image = photo()
    assert difference(stored, "input", image) < 1e-6
    assert stored["interaction_indexes"].tolist() == list(small.indexes)
    small.zero_grad()
    with switched_to(operator, monkeypatch):
        maps = small(image)
        loss = sum(level.square().mean() for level in maps) / 2
        loss.backward()
    for index, level in enumerate(small.layers(image)):
        assert difference(stored, f"trunk.{index}", level) < 1e-6
    for index, level in enumerate(maps):
        assert difference(stored, f"features.{index}", level) < 1e-4
    assert loss.item() == pytest.approx(float(stored["loss"]), rel=1e-4)
    wanted = {name[9:]: float(x) for name, x in stored.items() if name.startswith("gradnorm/")}
    found = {
        name: x.grad.norm().item() for name, x in small.named_parameters() if x.grad is not None
    }
    assert found == pytest.approx(wanted, rel=1e-3)


def test_chunks_without_gradients_change_nothing(small: DINOv3Adapter) -> None:
    image = torch.randn(1, 3, 64, 96)
    expected = small(image)
    with torch.inference_mode():
        for ours, whole in zip(small(image), expected, strict=True):
            torch.testing.assert_close(ours, whole.detach(), rtol=1e-4, atol=1e-4)


def test_adapter_has_the_authors_names(small: DINOv3Adapter) -> None:
    ours = {name: list(x.shape) for name, x in small.state_dict().items()}
    assert {name: x for name, x in ours.items() if not name.startswith("backbone.")} == {
        name: shape for name, shape in contract().items() if not name.startswith("backbone.")
    }
    trunk = timm.create_model(NAME, num_classes=0)
    assert {name[9:] for name in ours if name.startswith("backbone.")} == set(trunk.state_dict())


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str) -> None:
    indexes, width = SIZES[name]
    with torch.device("meta"):
        network = vitadapter_zoo.backbone(name, adapter="dinov3", pretrained=False)
    assert isinstance(network, DINOv3Adapter)
    assert network.indexes == indexes
    attention = network.interactions[0].extractor.attn  # type: ignore[union-attr]
    assert (attention.heads, attention.value_proj.out_features) == (16, width)  # type: ignore[union-attr]
    assert network.feature_info.channels() == [2 * width] * 4
    assert network.feature_info.reduction() == [4, 8, 16, 32]


def tiny(**settings: object) -> DINOv3Adapter:
    network = DINOv3Adapter(trunks.tiny(NAME), **settings)  # type: ignore[arg-type]
    return network.eval()


def test_a_frozen_trunk_stays_as_it_is() -> None:
    network = tiny().train()
    assert network.training
    assert not any(module.training for module in network.backbone.modules())
    before = {name: value.clone() for name, value in network.backbone.state_dict().items()}
    trained = [x for x in network.parameters() if x.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    sum(level.sum() for level in network(torch.randn(2, 3, 64, 96))).backward()
    assert all(x.grad is not None for x in trained)
    optimizer.step()
    assert all(torch.equal(before[name], x) for name, x in network.backbone.state_dict().items())


def test_a_trunk_that_is_not_frozen_learns() -> None:
    network = tiny(frozen=False).train()
    assert network.backbone.training
    sum(level.sum() for level in network(torch.randn(2, 3, 64, 96))).backward()
    without = [name for name, x in network.named_parameters() if x.grad is None]
    assert without == []


def test_layers_can_be_chosen() -> None:
    assert tiny(indexes=[0, 1, 2, 3]).indexes == (0, 1, 2, 3)
    for indexes in ([0, 1, 2], [0, 1, 2, 4], [3, 2, 1, 0], [-1, 0, 1, 2]):
        with pytest.raises(ConfigError, match="indexes="):
            tiny(indexes=indexes)


def test_widths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="5 heads do not divide the 32 channels"):
        tiny(deform_heads=5)


@pytest.mark.parametrize("shape", [(1, 3, 64, 80), (1, 4, 64, 64), (3, 64, 64)])
def test_other_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match="multiples of 32"):
        tiny()(torch.zeros(shape))


def loaded(path: Path, name: str = NAME) -> DINOv3Adapter:
    """A tiny network with the weights of a file."""
    from vitadapter_zoo.weights.trunks import read_backbone

    network = DINOv3Adapter(trunks.fresh(name))
    read_backbone(network, name, path, progress=False)
    return network.eval()


def same(ours: DINOv3Adapter, other: DINOv3Adapter) -> bool:
    image = torch.randn(1, 3, 64, 96)
    return all(torch.equal(x, y) for x, y in zip(ours(image), other(image), strict=True))


@pytest.mark.parametrize("wrapper", ["", "module.", "model._orig_mod."])
def test_whole_files_are_loaded(wrapper: str, tmp_path: Path) -> None:
    other = trunks.shaken(tiny())
    assert isinstance(other, DINOv3Adapter)
    whole = {f"backbone.{key}": x for key, x in trunks.authors_names(other.backbone).items()}
    whole |= {key: x for key, x in other.state_dict().items() if not key.startswith("backbone.")}
    path = trunks.save({wrapper + key: x for key, x in whole.items()}, tmp_path / "authors.pth")
    assert same(loaded(path), other)
    assert same(loaded(trunks.save(other.state_dict(), tmp_path / "ours.pth")), other)


@pytest.mark.parametrize("form", ["authors", "authors, nested", "timm", "timm, prefixed"])
def test_trunks_alone_are_loaded(
    form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    trunk = trunks.tiny(NAME)
    names = trunks.authors_names(trunk) if form.startswith("authors") else trunk.state_dict()
    prefix = "" if form in ("authors", "timm") else "backbone."
    path = trunks.save({prefix + key: x for key, x in names.items()}, tmp_path / "trunk.pth")
    state = loaded(path).backbone.state_dict()
    assert all(torch.equal(state[key], x) for key, x in trunk.state_dict().items())
    assert "the adapter's weights stay as they are" in caplog.text


def test_the_file_s_rotary_periods_are_used(tmp_path: Path) -> None:
    """The authors' published files hold them rounded to bfloat16."""
    trunk = trunks.tiny(NAME)
    names = trunks.authors_names(trunk)
    rounded = names["rope_embed.periods"].bfloat16().float()
    assert not torch.equal(rounded, names["rope_embed.periods"])
    path = trunks.save(names | {"rope_embed.periods": rounded}, tmp_path / "trunk.pth")
    assert torch.equal(loaded(path).backbone.rope.periods, rounded)
    path = trunks.save(names | {"rope_embed.periods": rounded * 1.1}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="rotary embedding of another base"):
        loaded(path)


def test_biases_that_would_be_lost_are_refused(tmp_path: Path) -> None:
    names = trunks.authors_names(trunks.tiny(NAME))
    without = "vit_small_patch16_dinov3"
    path = trunks.save(names, tmp_path / "biases.pth")
    with pytest.raises(
        CheckpointError, match=r"qkv.bias' is not zero .* use timm's name with qkvb"
    ):
        loaded(path, without)
    names |= {key: torch.zeros_like(x) for key, x in names.items() if key.endswith("qkv.bias")}
    loaded(trunks.save(names, tmp_path / "zeros.pth"), without)
    names["blocks.1.attn.qkv.bias_mask"] = torch.ones(192)
    with pytest.raises(CheckpointError, match="masks other biases than those of the keys"):
        loaded(trunks.save(names, tmp_path / "mask.pth"))


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    other = tiny()
    before = {key: value.clone() for key, value in other.state_dict().items()}
    state = dict(other.state_dict())
    del state["spm.fc2.bias"], state["backbone.blocks.3.norm2.weight"]
    state["norm5.weight"] = torch.zeros(64)
    with pytest.raises(CheckpointError, match=r"(?s)2 missing.*norm2.weight.*1 unexpected"):
        loaded(trunks.save(state, tmp_path / "incomplete.pth"))
    wide = trunks.fresh(NAME, embed_dim=128)
    with pytest.raises(CheckpointError, match="of another shape"):
        loaded(trunks.save(wide.state_dict(), tmp_path / "wide.pth"))
    with pytest.raises(CheckpointError, match="missing"):
        loaded(trunks.save({"layer1.weight": torch.zeros(3)}, tmp_path / "foreign.pth"))
    broken = dict(other.state_dict()) | {"level_embed": torch.full((3, 64), torch.nan)}
    with pytest.raises(CheckpointError, match="not finite"):
        loaded(trunks.save(broken, tmp_path / "nan.pth"))
    assert all(torch.equal(before[key], x) for key, x in other.state_dict().items())


def test_a_file_s_code_does_not_run(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    torch.save({"level_embed": helpers.RunsCode(target)}, tmp_path / "evil.pth")
    with pytest.raises(UnsafeCheckpointError):
        loaded(tmp_path / "evil.pth")
    assert not target.exists()
