"""``predict`` gives the same digits in any process, and leaves the model as it was."""

import copy
import locale
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import scenes
import standins
import torch
from torch import nn

from vitadapter_zoo import Detections, MaskRCNN, ZooError
from vitadapter_zoo.backends.comparison import native_stages
from vitadapter_zoo.models.modes import evaluating

Ambient = Callable[[], AbstractContextManager[None]]


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.draw_pictures(tmp_path_factory.mktemp("pictures"), 1)[0]


@pytest.fixture(scope="module")
def expected(small: MaskRCNN, picture: Path) -> Detections:
    found = small.predict(picture)[0]
    assert len(found) > 3
    return found


def same(found: Detections, expected: Detections) -> bool:
    return all(
        torch.equal(getattr(found, name), getattr(expected, name))
        for name in ("boxes", "scores", "labels", "masks")
    )


def default_dtype(dtype: torch.dtype) -> Ambient:
    @contextmanager
    def change() -> Iterator[None]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    return change


@contextmanager
def default_device() -> Iterator[None]:
    with torch.device("meta"):  # whatever is made on it cannot be computed with
        yield


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def strict_numpy() -> Iterator[None]:
    with np.errstate(all="raise"):
        yield


@contextmanager
def other_locale() -> Iterator[None]:
    before = locale.setlocale(locale.LC_ALL)
    locale.setlocale(locale.LC_ALL, "C")
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


@contextmanager
def coarse_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


AMBIENT: dict[str, Ambient] = {
    "bfloat16": default_dtype(torch.bfloat16),
    "float16": default_dtype(torch.float16),
    "float64": default_dtype(torch.float64),
    "device": default_device,
    "grad": torch.enable_grad,
    "no grad": torch.no_grad,
    "inference": torch.inference_mode,
    "deterministic": deterministic,
    "coarse products": coarse_products,
    "numpy": strict_numpy,
    "locale": other_locale,
}


@pytest.mark.parametrize("name", AMBIENT)
def test_no_state_of_the_process_changes_a_digit(
    name: str, small: MaskRCNN, picture: Path, expected: Detections
) -> None:
    with AMBIENT[name]():
        predicted = small.predict(picture)[0]
        called = small([picture])[0]
        masks = predicted.masks
        results = predicted.to_coco(1)
    assert predicted.boxes.dtype == predicted.scores.dtype == torch.float32
    assert masks.dtype == torch.bool
    assert same(predicted, expected)
    assert same(called, expected)
    assert results == expected.to_coco(1)


@pytest.mark.parametrize("part", ["", "backbone.spm", "neck"])
def test_predict_leaves_modes_and_statistics_as_they_were(
    part: str, small: MaskRCNN, picture: Path, expected: Detections
) -> None:
    model = copy.deepcopy(small)
    model.get_submodule(part).train()
    frozen = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    frozen.eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        assert same(model.predict(picture)[0], expected)
    assert [module.training for module in model.modules()] == modes
    assert any(modes)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_every_way_to_detect_evaluates(
    small: MaskRCNN, picture: Path, expected: Detections
) -> None:
    model = copy.deepcopy(small).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepared = model.preprocess(picture)
    found = model.detect([prepared])[0]  # with gradients on
    assert same(Detections.of(found, model.categories), expected)
    assert not found.boxes.requires_grad
    assert same(native_stages(model, prepared).detections, expected)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_calls_of_several_threads_may_overlap(small: MaskRCNN) -> None:
    """The call that ends first leaves the modes alone until the last has ended."""
    model = copy.deepcopy(small).train()
    first, second = evaluating(model), evaluating(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(module.training for module in model.modules())
    second.__exit__(None, None, None)
    assert all(module.training for module in model.modules())


def test_modes_come_back_after_an_error(small: MaskRCNN, picture: Path) -> None:
    model = copy.deepcopy(small).train()
    model.neck = nn.Linear(1, 1)
    with pytest.raises(TypeError):
        model.predict(picture)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("around", [nullcontext, torch.inference_mode])
def test_detections_are_ordinary_tensors(
    around: Ambient, small: MaskRCNN, picture: Path, expected: Detections
) -> None:
    with around():
        found = small.predict(picture)[0]
    masks = found.masks.clone()
    assert not any(t.is_inference() for t in (found.boxes, found.scores, found.labels, masks))
    found.boxes[:, 0] += 100
    assert torch.equal(found.boxes[:, 0], expected.boxes[:, 0] + 100)
    # The masks are where the network saw them.
    assert torch.equal(found.masks, masks)
    factor = torch.ones(1, requires_grad=True)
    (found.boxes * factor).sum().backward()
    assert factor.grad is not None


@pytest.mark.parametrize(
    "part",
    ["backbone.spm.fc1", "neck", "rpn_head.rpn_cls", "roi_head.bbox_head", "roi_head.mask_head"],
)
def test_a_network_that_computes_nan_says_so(part: str, small: MaskRCNN, picture: Path) -> None:
    model = copy.deepcopy(small)
    with torch.no_grad():
        module = model.get_submodule(part)
        for name in [name for name, _ in module.named_parameters()]:
            owner, _, leaf = name.rpartition(".")
            # New parameters: the old ones' memory is the fixture's.
            broken = torch.full_like(module.get_parameter(name), float("nan"))
            setattr(module.get_submodule(owner), leaf, nn.Parameter(broken))
    with pytest.raises(ZooError, match="NaN or infinite"):
        model.predict(picture, 0.01)


def test_predict_returns_plain_cpu_tensors_in_image_pixels(small: MaskRCNN) -> None:
    one, two = small.predict([standins.PHOTO, str(standins.PHOTO)], batch_size=2)
    assert one.boxes.dtype == one.scores.dtype == torch.float32
    assert one.masks.dtype == torch.bool
    assert one.masks.shape == (len(one), 427, 640)
    assert (one.scores > 0.05).all()
    assert (one.scores.diff() <= 0).all()
    torch.testing.assert_close(one.scores, two.scores, rtol=1e-3, atol=1e-3)
    assert len(small.predict(standins.PHOTO, score_threshold=0.9)[0]) < len(one)
    assert small.predict([]) == []


def test_predict_checks_its_options(small: MaskRCNN) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        small.predict(standins.PHOTO, batch_size=0)
    with pytest.raises(ValueError, match="score_threshold"):
        small.predict(standins.PHOTO, score_threshold=5)


def test_nothing_found_is_an_empty_result(small: MaskRCNN) -> None:
    found = small.predict(standins.PHOTO, score_threshold=1.0)[0]
    assert len(found) == 0
    assert found.masks.shape == (0, 427, 640)
    assert found.to_coco(1) == []
