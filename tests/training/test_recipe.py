"""The published recipe, and what is derived from it."""

import importlib
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from vitadapter_zoo import get_row, list_models
from vitadapter_zoo.backends import mmdet_config as config
from vitadapter_zoo.models import build
from vitadapter_zoo.models.layer_decay import depth_of
from vitadapter_zoo.training.batches import Batches
from vitadapter_zoo.training.recipe import Recipe, parameter_groups, published
from vitadapter_zoo.training.transforms import Objects, augmented, sizes

PAPER = [name for name in list_models() if get_row(name).size != "N"]


@pytest.mark.parametrize("name", PAPER)
def test_the_default_is_the_original_s_configuration(name: str) -> None:
    """Beside the configuration file that the mmdet backend writes."""
    row = get_row(name)
    recipe = published(row)
    schedule = config._schedule(row)
    optimizer = schedule["optimizer"]
    assert recipe.lr == optimizer["lr"]
    assert recipe.weight_decay == optimizer["weight_decay"]
    assert recipe.layer_decay == optimizer["paramwise_cfg"].get("layer_decay_rate")
    assert recipe.epochs == schedule["runner"]["max_epochs"]
    steps = [round(at * recipe.epochs) for at in recipe.milestones]
    assert steps == schedule["lr_config"]["step"]
    assert recipe.warmup == schedule["lr_config"]["warmup_iters"]
    assert recipe.warmup_ratio == schedule["lr_config"]["warmup_ratio"]
    assert recipe.clip is schedule["optimizer_config"]["grad_clip"] is None


def test_the_learning_rate_follows_the_batch() -> None:
    assert published(get_row("adapter-t-deit-3x")).scaled(2).lr == pytest.approx(1e-4 / 8)
    assert published(get_row("adapter-t-deit-1x")).scaled(32).lr == pytest.approx(4e-4)


def test_steps_and_warm_up() -> None:
    recipe, total = published(get_row("adapter-s-deit-3x")), 36 * 1000
    factors = [recipe.lr_factor(step, total) for step in range(total)]
    assert factors[0] == pytest.approx(1e-3)
    assert factors[250] == pytest.approx((1 + 1e-3) / 2)
    assert factors[500] == factors[26_999] == 1
    assert factors[27_000] == factors[32_999] == pytest.approx(0.1)
    assert factors[33_000] == factors[-1] == pytest.approx(0.01)
    assert all(a <= b for a, b in itertools.pairwise(factors[:501]))


def test_short_runs_warm_up_for_a_tenth() -> None:
    recipe = Recipe()
    assert recipe.lr_factor(9, 100) < 1
    assert recipe.lr_factor(10, 100) == 1
    assert recipe.lr_factor(0, 1) > 0


@pytest.mark.parametrize("epochs", [1, 5, 7, 12, 36, 100])
def test_milestones_fall_on_whole_epochs(epochs: int) -> None:
    recipe = replace(published(get_row("adapter-t-deit-1x")), epochs=epochs)
    total = epochs * 12
    factors = [recipe.lr_factor(step, total) for step in range(total)]
    changes = [step for step in range(total // 2, total) if factors[step] != factors[step - 1]]
    assert changes == [epochs * 8, epochs * 11]


def test_cosine_ends_with_the_time_limit() -> None:
    recipe = Recipe(schedule="cosine", warmup=0)
    assert recipe.lr_factor(50, 100) == pytest.approx(0.505)
    assert recipe.lr_factor(50, 100, progress=1.0) == pytest.approx(recipe.final_lr)


@pytest.mark.parametrize("name", ["adapter-t-deit-3x", "adapter-b-uniperceiver-3x"])
def test_every_parameter_is_in_one_group_with_its_decay(name: str) -> None:
    row = get_row(name)
    with torch.device("meta"):
        model = build(row)
    frozen = model.rpn_head.rpn_conv.weight.requires_grad_(False)
    recipe = published(row)
    groups = parameter_groups(model, recipe)
    found = {id(x): group for group in groups for x in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found)
    for parameter_name, parameter in model.named_parameters():
        if parameter is frozen:
            assert id(parameter) not in found
            continue
        group = found[id(parameter)]
        words = ("norm", "bias", "gamma", "pos_embed", "level_embed")
        kept = any(word in parameter_name for word in words) or parameter.ndim == 1
        assert group["weight_decay"] == (0 if kept else 0.05), parameter_name
        exponent = 13 - depth_of(parameter_name, 12)
        assert group["lr_scale"] == pytest.approx((recipe.layer_decay or 1) ** exponent)


def test_depths() -> None:
    assert depth_of("backbone.pos_embed", 24) == 0
    assert depth_of("backbone.blocks.0.norm1.weight", 24) == 1
    assert depth_of("backbone.layers.11.linear1.weight", 12) == 12
    assert depth_of("backbone.interactions.0.injector.gamma", 24) == 25
    assert depth_of("roi_head.bbox_head.fc_cls.weight", 24) == 25


def scene(height: int, width: int) -> tuple[np.ndarray, Objects]:
    """A white rectangle on black, and one in a corner."""
    boxes = np.array([[40, 30, 200, 90], [0, 0, 12, 16]], np.float32)
    masks = np.zeros((2, height, width), np.uint8)
    masks[0, 30:90, 40:200] = 1
    masks[1, :16, :12] = 1
    image = np.repeat(255 * masks.max(0)[..., None], 3, axis=2)
    return image, Objects(boxes, np.array([4, 2]), masks)


@pytest.mark.parametrize("augment", ["multi-scale", "flip", "none"])
def test_views_keep_image_boxes_and_masks_together(augment: str) -> None:
    drawn = sizes(augment, (1333, 800))  # type: ignore[arg-type]
    seen = set()
    for seed in range(30 if augment == "multi-scale" else 4):
        image, objects = augmented(*scene(240, 320), drawn, np.random.default_rng(seed))
        height, width = image.shape[:2]
        assert max(height, width) <= 1333
        assert objects.masks.shape[1:] == (height, width)
        seen.add(len(objects.labels))
        for box, mask, label in zip(objects.boxes, objects.masks, objects.labels, strict=True):
            if not mask.any():  # cut to less than a pixel before it was enlarged
                assert (box[2:] - box[:2]).min() < 8
                continue
            rows, columns = np.nonzero(mask)
            around = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert np.abs(np.array(around) - box).max() <= 3, (label, around, box)
            assert image[mask == 1].mean() > 200
        assert min(height, width) in drawn.short_sides or max(height, width) in (1333, 1024)
    assert seen >= ({1, 2} if augment == "multi-scale" else {2})


def test_the_published_sizes() -> None:
    drawn = sizes("multi-scale", (1333, 800))
    assert drawn.short_sides == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert (drawn.before_crop, drawn.crop, drawn.largest) == ((400, 500, 600), (384, 600), 1024)
    assert sizes("flip", (1333, 800)).short_sides == (800,)
    assert sizes("multi-scale", (320, 256)).short_sides[-1] == 256


@pytest.mark.parametrize("processes", [1, 2])
def test_batches_are_a_function_of_the_step(processes: int) -> None:
    wide = [place % 3 > 0 for place in range(23)]
    whole = [list(Batches(wide, 4, 3, 5, 0, rank, processes)) for rank in range(processes)]
    per_epoch = Batches(wide, 4, 3, 5, 0, 0, processes).per_epoch
    assert len(whole[0]) == 3 * per_epoch
    for start in (1, per_epoch, 2 * per_epoch + 1):
        assert list(Batches(wide, 4, 3, 5, start, 0, processes)) == whole[0][start:]
    for epoch in range(3):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        drawn = [place for rank in whole for step in steps for _, place in rank[step]]
        assert set(drawn) == set(range(23))  # each of them, and a few twice to fill up
        assert len(drawn) == math.ceil(23 / 4 / processes) * 4 * processes or processes == 1
    assert whole[0][:per_epoch] != whole[0][per_epoch : 2 * per_epoch]


def test_few_images_fill_a_batch() -> None:
    batches = list(Batches([True, False], 8, 2, 0))
    assert [len(batch) for batch in batches] == [8, 8]


def test_the_recipe_needs_no_torch() -> None:
    module = importlib.import_module("vitadapter_zoo.training.recipe")
    assert not hasattr(module, "torch")
