import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import parity
import pytest
import standins
import torch
from operators import switched_to
from torch import Tensor, nn
from torch.fx import GraphModule
from torchvision.ops import box_iou, roi_align

from vitadapter_zoo import MaskRCNN, get_row
from vitadapter_zoo.catalog import PUBLISHED
from vitadapter_zoo.models import (
    boxes,
    build,
    heads,
    spatial_prior,
    tokens,
    uniperceiver,
    vit,
)

NAMES = [row.name for row in PUBLISHED]
WITH_OUTPUTS = [
    "adapter-t-deit-3x",
    "vit-t-deit-3x",
    "adapter-s-deit-3x-nofpn",
    "adapter-b-uniperceiver-3x",
]
# Millions of values in each file's state dict, from ../shared/design/published-files.md.
MILLIONS = {
    "vit-t-deit-3x": 26.08,
    "adapter-t-deit-1x": 28.07,
    "adapter-t-deit-3x": 28.07,
    "vit-s-deit-3x": 43.75,
    "adapter-s-deit-3x": 47.81,
    "adapter-s-deit-3x-nofpn": 45.44,
    "vit-b-deit-3x": 113.59,
    "adapter-b-deit-3x": 120.19,
    "vit-l-augreg-3x": 337.29,
    "adapter-l-augreg-3x": 347.94,
    "adapter-s-dinov2-3x": 48.26,
    "adapter-b-dinov2-3x": 121.10,
    "adapter-l-dinov2-3x": 348.75,
}


def on_meta(name: str) -> MaskRCNN:
    with torch.device("meta"):
        return build(get_row(name))


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_names_and_shapes_are_the_original_s(name: str) -> None:
    state = {key: list(value.shape) for key, value in on_meta(name).state_dict().items()}
    assert state == standins.contract(name)


@pytest.mark.parametrize(("name", "millions"), MILLIONS.items())
def test_parameter_counts(name: str, millions: float) -> None:
    numbers = sum(value.numel() for value in on_meta(name).state_dict().values())
    assert numbers / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize("name", WITH_OUTPUTS)
def test_agrees_with_the_original(name: str, standin_model: Callable[[str], MaskRCNN]) -> None:
    assert parity.compare(standin_model(name)).failures() == []


@pytest.mark.parametrize("name", WITH_OUTPUTS)
def test_chunks_give_the_same_result_as_whole_images(
    name: str, standin_model: Callable[[str], MaskRCNN], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = standin_model(name).backbone
    images = torch.randn(2, 3, 256, 320)
    with torch.enable_grad():  # with gradients there are no chunks and no replaced linear layers
        expected = [level.detach() for level in backbone(images)]
    for size in (2**20, 2**22):  # the smaller size gives chunks of a single row and of few tokens
        monkeypatch.setattr(tokens, "CHUNK_BYTES", size)
        with torch.inference_mode():
            for ours, whole in zip(backbone(images), expected, strict=True):
                torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_batch_statistics_are_computed_over_whole_maps(
    tiny: MaskRCNN, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = torch.randn(1, 3, 128, 128)
    means = []
    for size in (tokens.CHUNK_BYTES, 2**17):
        monkeypatch.setattr(tokens, "CHUNK_BYTES", size)
        backbone = copy.deepcopy(tiny.backbone)
        backbone.get_submodule("norm1").train()
        backbone(image)
        means.append(backbone.get_buffer("norm1.running_mean"))
    torch.testing.assert_close(means[1], means[0], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize(("batch", "length"), [(3, 196), (2, 500), (1, 2500)])
def test_bfloat16_attention_agrees_with_float32(batch: int, length: int) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(batch, length, 3 * 2 * 64)
    rounded = vit.self_attention(qkv.bfloat16(), 2)
    assert rounded.dtype == torch.bfloat16
    exact = vit.self_attention(qkv, 2)
    assert (rounded - exact).norm() < 0.02 * exact.norm()


def test_agrees_with_the_original_without_the_compiled_operator(
    standin_model: Callable[[str], MaskRCNN], monkeypatch: pytest.MonkeyPatch
) -> None:
    with switched_to("reference", monkeypatch):
        assert parity.compare(standin_model("adapter-t-deit-3x")).failures() == []


def test_parity_check_detects_a_wrong_network(standin_model: Callable[[str], MaskRCNN]) -> None:
    model = standin_model("vit-t-deit-3x")
    with torch.no_grad():
        model.get_parameter("neck.fpn_convs.2.conv.bias").add_(0.01)
    failures = parity.compare(model).failures()
    assert any(failure.startswith("values of neck.2 differ") for failure in failures)
    assert not any("backbone" in failure for failure in failures)


@pytest.mark.parametrize("name", NAMES)
def test_layer_norms_have_the_original_s_epsilon(name: str) -> None:
    # A wrong epsilon (1e-5 for 1e-6) changes features by less than the tolerance of other tests.
    found = {module.eps for module in on_meta(name).modules() if isinstance(module, nn.LayerNorm)}
    assert found == {1e-5 if name == "adapter-b-uniperceiver-3x" else 1e-6}


def windowed_by_loops(
    project: nn.Module, heads: int, x: Tensor, size: int, project_first: bool
) -> Tensor:
    """Compute 14x14 windowed attention with an explicit softmax, one window at a time."""
    height, width = x.shape[1:3]
    dim = x.shape[3]
    padded_shape = (-(-height // size) * size, -(-width // size) * size)
    source = project(x) if project_first else x
    padded = source.new_zeros(x.shape[0], *padded_shape, source.shape[-1])
    padded[:, :height, :width] = source
    result = x.new_zeros(x.shape[0], *padded_shape, dim)
    for top in range(0, padded_shape[0], size):
        for left in range(0, padded_shape[1], size):
            window = padded[:, top : top + size, left : left + size].flatten(1, 2)
            q, k, v = (window if project_first else project(window)).split(dim, dim=-1)
            parts = []
            for head in range(heads):
                own = slice(head * dim // heads, (head + 1) * dim // heads)
                logits = q[..., own] @ k[..., own].transpose(1, 2) / (dim / heads) ** 0.5
                parts.append(logits.softmax(-1) @ v[..., own])
            attended = torch.cat(parts, dim=-1).unflatten(1, (size, size))
            result[:, top : top + size, left : left + size] = attended
    return result[:, :height, :width].flatten(1, 2)


@pytest.mark.parametrize(("height", "width"), [(5, 30), (14, 14), (29, 3)])
def test_padded_tokens_are_part_of_windowed_attention(height: int, width: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, height, width, 12)
    plain = vit.Attention(12, 3, windowed=True)
    expected = plain.proj(windowed_by_loops(plain.qkv, 3, x, 14, project_first=True))
    torch.testing.assert_close(plain(x.flatten(1, 2), height, width), expected)
    uni = uniperceiver.SelfAttention(12, 3, windowed=True)
    expected = uni.out_proj(windowed_by_loops(uni.in_proj, 3, x, 14, project_first=False))
    torch.testing.assert_close(uni(x.flatten(1, 2), height, width), expected)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["adapter-t-deit-3x", "vit-t-deit-3x"])
def test_an_image_does_not_depend_on_its_batch(
    name: str, standin_model: Callable[[str], MaskRCNN]
) -> None:
    backbone = standin_model(name).backbone
    images = torch.randn(2, 3, 96, 160)
    for together, alone in zip(backbone(images), backbone(images[1:]), strict=True):
        torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("name", WITH_OUTPUTS)
def test_compiles_without_graph_breaks(name: str) -> None:
    torch._dynamo.reset()
    model = build(get_row(name)).eval()
    image = torch.randn(1, 3, 64, 96)

    def features(x: Tensor) -> list[Tensor]:
        levels: list[Tensor] = model.neck(model.backbone(x))
        return levels

    compiled = torch.compile(features, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(image), features(image), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_autocast_finds_the_same_objects(tiny: MaskRCNN) -> None:
    exact = tiny.predict(standins.PHOTO)[0].filter(0.5)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = tiny.predict(standins.PHOTO)[0]
    assert rounded.boxes.dtype == rounded.scores.dtype == torch.float32
    # With stand-in weights many scores are close to the threshold, so some detections differ.
    ious = box_iou(exact.boxes, rounded.boxes)
    ious[exact.labels[:, None] != rounded.labels] = 0
    assert (ious.max(dim=1).values > 0.8).double().mean() > 0.5


@torch.inference_mode()
def test_bfloat16_weights_find_the_same_objects(tiny: MaskRCNN) -> None:
    exact = tiny.predict(standins.PHOTO)[0].filter(0.5)
    rounded = copy.deepcopy(tiny).to(torch.bfloat16).predict(standins.PHOTO)[0]
    assert rounded.boxes.dtype == rounded.scores.dtype == torch.float32
    ious = box_iou(exact.boxes, rounded.boxes)
    ious[exact.labels[:, None] != rounded.labels] = 0
    assert (ious.max(dim=1).values > 0.8).double().mean() > 0.5


@torch.inference_mode()
def test_compile_keeps_results_and_state_dict_names() -> None:
    torch._dynamo.reset()
    model = build(get_row("adapter-t-deit-3x")).eval()
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    prepared = model.preprocess(image)
    prepared = replace(prepared, tensor=prepared.tensor[..., :96, :128], resized=(96, 128))
    names = list(model.state_dict())
    expected = model.detect([prepared], score_threshold=0.0)[0]
    graphs: list[object] = []

    def noted(module: GraphModule, inputs: list[Tensor]) -> GraphModule:
        graphs.append(module)
        return module

    model.compile(backend=noted)
    found = model.detect([prepared], score_threshold=0.0)[0]
    assert list(model.state_dict()) == names
    assert len(graphs) == 3  # one graph each for backbone, neck and proposal head
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-4, atol=1e-2)


@torch.inference_mode()
@pytest.mark.parametrize("name", WITH_OUTPUTS)
def test_maps_stay_channels_last(name: str) -> None:
    # Another memory order gives the same results but needs copies and slower kernels.
    model = build(get_row(name)).eval()
    maps = model.backbone(torch.randn(1, 3, 64, 96))
    ordered = [
        x.is_contiguous(memory_format=torch.channels_last) for x in (*maps, *model.neck(maps))
    ]
    assert all(ordered), ordered


@torch.inference_mode()
def test_folding_batch_norm_into_the_convolution_gives_the_same_result() -> None:
    torch.manual_seed(0)
    layers = spatial_prior.Convolutions(3, 8, 16, strides=(2, 1))
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            for values in (*layer.parameters(), *layer.buffers()):
                values.copy_(torch.rand(values.shape) + 0.5)
    layers.eval()
    x = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(layers(x), nn.Sequential(*layers)(x))
    assert list(layers.state_dict()) == list(nn.Sequential(*layers).state_dict())


@torch.inference_mode()
def test_masks_of_given_classes_equal_those_computed_for_all_classes() -> None:
    torch.manual_seed(0)
    head = heads.MaskHead(80).eval()
    pooled, labels = torch.randn(5, 256, 14, 14), torch.tensor([0, 79, 3, 3, 40])
    torch.testing.assert_close(head(pooled, labels), head(pooled)[torch.arange(5), labels])


@torch.inference_mode()
@pytest.mark.parametrize("operator", ["compiled", "reference"])
@pytest.mark.parametrize("size", [7, 14])
def test_roi_align_agrees_with_torchvision(
    size: int, operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(2, 16, 30, 40, generator=generator)
    # Boxes far outside of the map, long and thin, tiny, without area, and with negative sides.
    corners = torch.rand(300, 2, generator=generator) * torch.tensor([420.0, 340.0]) - 50
    sides = torch.rand(300, 2, generator=generator) ** 3 * 300 - 1
    images = torch.randint(0, 2, (300, 1), generator=generator).float()
    rois = torch.cat([images, corners, corners + sides], dim=1)
    rois[:3, 3:] = rois[:3, 1:3]
    expected = roi_align(x, rois, size, 1 / 8, -1, aligned=True)
    with switched_to(operator, monkeypatch):
        for ordered in (x, x.contiguous(memory_format=torch.channels_last)):
            torch.testing.assert_close(boxes.roi_align(ordered, rois, size, 1 / 8), expected)


def test_every_parameter_has_a_gradient_in_training_mode() -> None:
    model = build(get_row("adapter-t-deit-3x")).train()
    levels = model.neck(model.backbone(torch.randn(2, 3, 64, 64)))
    sum(level.square().mean() for level in levels).backward()
    without = [
        name
        for name, parameter in model.named_parameters()
        if name.startswith(("backbone", "neck")) and parameter.grad is None
    ]
    assert without == []
