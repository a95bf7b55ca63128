"""The CUDA path on machines without a GPU: no operator mixes devices, and the CPU rarely waits.

The device is `fake_cuda.device`. What it computes comes from the CPU's operators, so results are
compared with those of the CPU's path, too.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fake_cuda
import pytest
import scenes
import torch
from fake_cuda import Device, FakeTensor
from recorded import RecordedCapture
from torch import Tensor

from vitadapter_zoo import MaskRCNN, ZooError, get_row
from vitadapter_zoo.catalog import COCO_CLASSES
from vitadapter_zoo.evaluation.dataset import Image
from vitadapter_zoo.evaluation.evaluator import Evaluator, Prepared, read
from vitadapter_zoo.evaluation.identity import precision
from vitadapter_zoo.models import boxes, build, heads
from vitadapter_zoo.models.adapter import Geometry
from vitadapter_zoo.models.graphs import CALLS_BEFORE, Graphs
from vitadapter_zoo.models.losses import losses
from vitadapter_zoo.models.vit import resized_position_embedding

# Of one image: suppression of proposals, suppression of boxes, and the download.
WAITS_OF_AN_IMAGE = 3
# In the losses' forward pass: suppression of proposals, uploads and mask targets.
LAUNCHES_OF_ANOTHER_IMAGE = 70


@pytest.fixture
def cuda() -> Iterator[Device]:
    with fake_cuda.device() as mode:
        yield mode


@pytest.fixture(scope="module")
def nano() -> MaskRCNN:
    """A narrow detector with random weights for small images; tests must not change it."""
    torch.manual_seed(0)
    model = build(replace(get_row("adapter-n-emoji"), input_size=(64, 40)), COCO_CLASSES)
    with torch.no_grad():
        model.get_parameter("roi_head.bbox_head.fc_cls.bias")[:2] += 3  # to have some detections
    return model.eval()


@pytest.fixture
def labelled(nano: MaskRCNN, cuda: Device) -> MaskRCNN:
    """The same on the fake device."""
    return fake_cuda.moved(copy.deepcopy(nano))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.draw_pictures(tmp_path_factory.mktemp("pictures"), 1)[0]


def waits(cuda: Device, call: Callable[[], object]) -> int:
    """Count the waits of a second call; the first one may upload what is kept afterwards."""
    call()
    cuda.waits.clear()
    call()
    return cuda.synchronisations


def test_the_device_refuses_mixtures_and_counts_waits(cuda: Device) -> None:
    on_cuda = torch.arange(6.0, device="cuda").view(2, 3)
    assert isinstance(on_cuda, FakeTensor)
    assert on_cuda.device.type == "cuda"
    with pytest.raises(fake_cuda.MixedDevicesError):
        on_cuda + torch.ones(3)
    assert cuda.synchronisations == 0
    assert (on_cuda + torch.tensor(1.0)).shape == (2, 3)  # CUDA takes CPU scalars
    steps: dict[str, Callable[[], object]] = {
        "item": lambda: on_cuda.sum().item(),
        "bool": lambda: bool(on_cuda.isfinite().all()),
        "tolist": on_cuda.tolist,
        "cpu": on_cuda.cpu,
        "mask": lambda: on_cuda[on_cuda > 2],
        "nonzero": lambda: on_cuda.nonzero(),
        "unique": lambda: torch.unique(on_cuda),
        "upload": lambda: torch.tensor([1.0], device="cuda"),
        "new_tensor": lambda: on_cuda.new_tensor([1.0]),
        "copy_": lambda: torch.zeros(2, 3).copy_(on_cuda),
    }
    for name, step in steps.items():
        cuda.waits.clear()
        step()
        assert cuda.synchronisations == 1, (name, cuda.waits)
    cuda.waits.clear()
    torch.ones(3).to("cuda", non_blocking=True)
    assert on_cuda[:, torch.tensor([0, 1]).to("cuda", non_blocking=True)].shape == (2, 2)
    on_cuda[:, :2].add_(1)
    assert cuda.synchronisations == 0
    assert on_cuda.tolist() == [[1, 2, 2], [4, 5, 5]]


def test_predict_waits_three_times_an_image(
    cuda: Device, labelled: MaskRCNN, nano: MaskRCNN, picture: Path
) -> None:
    assert waits(cuda, lambda: labelled.predict(picture)) <= WAITS_OF_AN_IMAGE
    found, expected = labelled.predict(picture)[0], nano.predict(picture)[0]
    assert len(found) == len(expected) > 3
    assert found.boxes.device.type == found.masks.device.type == "cpu"
    assert torch.equal(found.labels, expected.labels)
    # The device has other kernels for linear layers.
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-3, atol=1e-4)


def test_a_batch_waits_once_more_than_twice_an_image(
    cuda: Device, labelled: MaskRCNN, picture: Path
) -> None:
    assert waits(cuda, lambda: labelled.predict([picture] * 3, batch_size=3)) <= 2 * 3 + 1


def test_verify_waits_three_times_an_image(cuda: Device, labelled: MaskRCNN, picture: Path) -> None:
    size = labelled.preprocess(picture).original
    evaluator = Evaluator(labelled, tuple(range(1, 81)))

    def one_image() -> None:
        prepared = evaluator.prepare(read(Image(1, picture, size, frozenset())))
        assert isinstance(prepared, Prepared)
        result = evaluator.finish(prepared, evaluator.detect(prepared))
        assert len(result.masks) > 3

    assert waits(cuda, one_image) <= WAITS_OF_AN_IMAGE


def test_backbone_neck_and_proposal_head_fit_into_a_graph(
    cuda: Device, labelled: MaskRCNN, nano: MaskRCNN, picture: Path
) -> None:
    capture = RecordedCapture(cuda)
    labelled.graphs = Graphs(capture)
    items = [labelled.preprocess(picture), labelled.preprocess(picture)]
    items[1] = replace(items[1], tensor=items[1].tensor.flip(-1))
    with torch.inference_mode():
        expected = [nano.detect([item])[0] for item in items]
        labelled.detect([items[0]])
        cuda.launches = 0
        labelled.detect([items[0]])
        usual = cuda.launches
        for number in range(CALLS_BEFORE + 4):
            cuda.launches = 0
            cuda.waits.clear()
            found = labelled.detect([items[number % 2]], repeated=True)[0]
            assert len(found.boxes) > 3
            torch.testing.assert_close(found.boxes, expected[number % 2].boxes, rtol=1e-3, atol=0.1)
    assert capture.captured == 1
    assert capture.waits == 0
    assert cuda.synchronisations <= WAITS_OF_AN_IMAGE
    assert cuda.launches < 0.4 * usual, (cuda.launches, usual, capture.launches)


def test_a_graph_keeps_the_constants_that_it_reads(
    cuda: Device, labelled: MaskRCNN, picture: Path
) -> None:
    capture = RecordedCapture(cuda)
    labelled.graphs = Graphs(capture)
    item = labelled.preprocess(picture)
    with torch.inference_mode():
        for _ in range(CALLS_BEFORE + 1):
            labelled.detect([item], repeated=True)
    ((graph, _),) = labelled.graphs._graphs.values()
    held = {id(tensor) for tensor in graph.held}
    geometry = Geometry.of(item.tensor.to("cuda", non_blocking=True))
    assert {id(x) for x in (geometry.prior_points, geometry.trunk_points)} <= held
    assert {id(x) for x in labelled.backbone.parameters()} <= held


def test_a_position_embedding_is_resized_by_products(cuda: Device) -> None:
    for side, height, width in ((14, 50, 76), (14, 5, 9), (37, 37, 12)):
        embedding = torch.randn(side * side, 8, generator=torch.Generator().manual_seed(0))
        for dtype in (torch.float32, torch.bfloat16):
            expected = resized_position_embedding(embedding.to(dtype), height, width)
            found = resized_position_embedding(embedding.to(dtype).to("cuda"), height, width)
            assert (found.dtype, found.shape) == (dtype, expected.shape)
            torch.testing.assert_close(
                found.cpu(), expected, atol=2e-6, rtol=1e-5 + 8e-3 * (dtype == torch.bfloat16)
            )


def test_tf32_is_part_of_a_run_s_identity(labelled: MaskRCNN, nano: MaskRCNN) -> None:
    assert precision(labelled) == "float32"
    labelled.allow_tf32 = True
    assert precision(labelled) == "tf32"
    on_cpu = copy.deepcopy(nano)
    on_cpu.allow_tf32 = True
    assert precision(on_cpu) == "float32"


def test_more_candidates_than_the_fixed_number(
    cuda: Device, labelled: MaskRCNN, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = labelled.predict(picture, 0.01)[0]
    monkeypatch.setattr(heads, "MOST_CANDIDATES", 5)
    found = labelled.predict(picture, 0.01)[0]
    assert len(expected) > 5
    assert torch.equal(found.boxes, expected.boxes)
    assert torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize("part", ["backbone.spm.fc1", "rpn_head.rpn_cls", "roi_head.bbox_head"])
def test_nan_is_found_with_the_download(
    cuda: Device, labelled: MaskRCNN, picture: Path, part: str
) -> None:
    with torch.no_grad():
        for parameter in labelled.get_submodule(part).parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(ZooError, match="NaN or infinite"):
        labelled.predict(picture, 0.01)


def test_losses_wait_once_an_image_and_once_a_batch(
    cuda: Device, labelled: MaskRCNN, picture: Path
) -> None:
    item = labelled.preprocess(picture)
    height, width = item.tensor.shape[-2:]
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    masks[:, 4:20, 4:20] = True
    target = {
        "boxes": torch.tensor([[4.0, 4, 20, 20], [8, 8, 30, 30]]),
        "labels": torch.tensor([3, 7]),
        "masks": masks,
    }
    launches = []
    for images in (1, 3):
        found: dict[str, Tensor] = {}

        def step(images: int = images, found: dict[str, Tensor] = found) -> None:
            found.update(losses(labelled, [item] * images, [target] * images))

        # Each image's suppression of proposals, and the numbers of chosen regions.
        assert waits(cuda, step) <= images + 1
        assert all(bool(value.isfinite()) for value in found.values())
        cuda.launches = 0
        step()
        launches.append(cuda.launches)
    print("launches of the losses' forward pass, 1 and 3 images:", *launches)
    assert (launches[1] - launches[0]) / 2 <= LAUNCHES_OF_ANOTHER_IMAGE


def test_suppression_of_valid_boxes_is_that_of_the_chosen(cuda: Device) -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (0, 1, 40, 400):
        corners = torch.rand(count, 2, generator=generator) * 200
        found = torch.cat([corners, corners + torch.rand(count, 2, generator=generator) * 60], 1)
        scores = torch.rand(count, generator=generator).mul(20).round() / 20  # with ties
        groups = torch.randint(5, (count,), generator=generator)
        for share in (0.0, 0.5, 1.0):
            valid = torch.rand(count, generator=generator) < share
            holed = found.where(valid[:, None], torch.nan)
            expected = boxes.nms_by_group(holed, scores, groups, 0.5, valid)
            on_cuda = [x.to("cuda") for x in (holed, scores, groups)]
            kept = boxes.nms_by_group(on_cuda[0], on_cuda[1], on_cuda[2], 0.5, valid.to("cuda"))
            assert torch.equal(kept.cpu(), expected)


def test_pooling_of_all_boxes_on_all_levels_is_that_of_each_level(cuda: Device) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 8, 128 // s, 160 // s, generator=generator) for s in (4, 8, 16, 32)]
    corners = torch.rand(60, 2, generator=generator) * 60
    sides = torch.rand(60, 2, generator=generator).square() * 600
    images = torch.randint(2, (60, 1), generator=generator)
    rois = torch.cat([images, corners, corners + sides], dim=1)
    rois[0, 1] = float("nan")
    expected = boxes.pool_rois(maps, rois, 7)
    pooled = boxes.pool_rois([x.to("cuda") for x in maps], rois.to("cuda"), 7)
    torch.testing.assert_close(pooled.cpu(), expected, rtol=1e-5, atol=1e-5)
    assert not pooled.cpu()[0].any()
