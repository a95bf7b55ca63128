import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmcv
import mmdet.models
import numpy as np
import parity
import pytest
import scenes
import standins
import torch
from mmcv.parallel import MMDataParallel
from mmdet.apis import inference_detector, init_detector, single_gpu_test
from mmdet.core import build_optimizer
from mmdet.datasets import build_dataloader, build_dataset
from PIL import Image
from torch import nn

import vitadapter_zoo
from vitadapter_zoo import BackendError, Detections, MaskRCNN, ZooError, get_row
from vitadapter_zoo.backends import mmdet as backend
from vitadapter_zoo.backends.comparison import detection_differences, differences, native_stages
from vitadapter_zoo.backends.mmdet_config import as_python, mmdet_config
from vitadapter_zoo.catalog import COCO_CATEGORY_IDS, COCO_CLASSES, PUBLISHED
from vitadapter_zoo.weights.convert import to_mmdet

COMMAND = str(Path(sys.executable).parent / "vitadapter-zoo")
Both = Callable[[str], tuple[MaskRCNN, nn.Module]]
COMPARED = [
    "adapter-t-deit-3x",
    "vit-t-deit-3x",
    "adapter-s-deit-3x-nofpn",
    "adapter-b-uniperceiver-3x",
]


@pytest.fixture(scope="module")
def annotated(images: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A data set of two of the pictures in COCO's form: what mmdet's configurations name."""
    folder = tmp_path_factory.mktemp("coco")
    chosen = [images["landscape"], images["tiny"]]
    sizes = [Image.open(path).size for path in chosen]
    content = {
        "images": [
            {"id": index, "file_name": path.name, "width": width, "height": height}
            for index, (path, (width, height)) in enumerate(zip(chosen, sizes, strict=True))
        ],
        "annotations": [
            {
                "id": 1 + index, "image_id": index, "category_id": 1, "iscrowd": 0,
                "bbox": [2, 2, width - 4, height - 4], "area": (width - 4) * (height - 4),
                "segmentation": [[2, 2, width - 2, 2, width - 2, height - 2, 2, height - 2]],
            }
            for index, (width, height) in enumerate(sizes)
        ],
        "categories": [
            {"id": key, "name": name}
            for key, name in zip(COCO_CATEGORY_IDS, COCO_CLASSES, strict=True)
        ],
    }  # fmt: skip
    (folder / "annotations.json").write_text(json.dumps(content))
    return {
        "ann_file": str(folder / "annotations.json"),
        "img_prefix": str(images["landscape"].parent),
    }


def test_load_gives_mmdet_s_own_class_with_the_weights(
    published_file: Callable[[str], Path],
) -> None:
    name = "adapter-t-deit-3x"
    model: Any = vitadapter_zoo.load(name, checkpoint=published_file(name), backend="mmdet")
    assert type(model) is mmdet.models.MaskRCNN
    assert not model.training
    state = model.state_dict()
    assert set(state) == set(standins.contract(name))
    assert all(torch.equal(state[key], value) for key, value in standins.state_dict(name).items())
    assert model.CLASSES[:2] == ("person", "bicycle")
    assert model.cfg.data.test.pipeline[1].img_scale == (1333, 800)


def test_layer_scales_are_filled_by_the_loader_s_rule(tmp_path: Path) -> None:
    name = "adapter-t-deit-1x"
    tensors = {k: v for k, v in standins.state_dict(name).items() if ".gamma1" not in k}
    tensors = {k: v for k, v in tensors.items() if ".gamma2" not in k}
    torch.save({"state_dict": tensors}, tmp_path / "old.pth")
    model = vitadapter_zoo.load(name, checkpoint=tmp_path / "old.pth", backend="mmdet")
    assert torch.equal(model.state_dict()["backbone.blocks.3.gamma1"], torch.ones(192))


def test_only_float32() -> None:
    with pytest.raises(BackendError, match="float32"):
        vitadapter_zoo.load(
            "vit-t-deit-3x", pretrained=False, dtype=torch.bfloat16, backend="mmdet"
        )


@pytest.mark.parametrize("name", COMPARED)
def test_mmdet_computes_what_the_original_computed(name: str, both: Both) -> None:
    stages = backend.stages(both(name)[1], standins.PHOTO)
    assert parity.compare_stages(stages, name).failures() == []


@pytest.mark.parametrize("name", COMPARED)
def test_both_backends_compute_the_same(name: str, both: Both, images: dict[str, Path]) -> None:
    native, other = both(name)
    for kind, path in images.items():
        ours, theirs = native_stages(native, path), backend.stages(other, path)
        apart = [stage for stage in differences(ours, theirs) if not stage.agrees]
        assert apart == [], kind
        assert len(theirs.detections) > 0, kind


def test_a_difference_is_found_where_it_arises(
    standin_model: Callable[[str], MaskRCNN],
    plain: tuple[MaskRCNN, nn.Module],
    images: dict[str, Path],
) -> None:
    changed = standin_model("vit-t-deit-3x")
    with torch.no_grad():
        changed.get_parameter("neck.fpn_convs.2.conv.bias").add_(0.01)
    found = differences(
        native_stages(changed, images["tiny"]), backend.stages(plain[1], images["tiny"])
    )
    wrong = [stage.stage for stage in found if not stage.agrees]
    assert wrong[0] == "neck.2"


def test_detect_takes_every_kind_of_image(
    plain: tuple[MaskRCNN, nn.Module], images: dict[str, Path]
) -> None:
    path = images["rotated"]
    from_path = backend.detect(plain[1], path)
    result = inference_detector(plain[1], str(path))
    assert len(from_path) == sum(len(boxes) for boxes in result[0])
    assert from_path.masks.shape[1:] == (100, 300)
    assert (from_path.scores.diff() <= 0).all()
    turned = np.asarray(Image.open(path).rotate(-90, expand=True))
    again = backend.detect(plain[1], turned)
    assert all(stage.agrees for stage in detection_differences(again, from_path))
    assert plain[1].cfg.data.test.pipeline[0].type == "LoadImageFromFile"  # type: ignore[union-attr,index]
    with pytest.raises(vitadapter_zoo.ImageError):
        backend.detect(plain[1], Path(__file__))


def test_detect_without_detections_is_empty(images: dict[str, Path], both: Both) -> None:
    strict = both("vit-t-deit-3x")[1]
    strict.roi_head.test_cfg.score_thr = 1.1  # type: ignore[union-attr]
    found = backend.detect(strict, images["tiny"])
    assert (len(found), found.masks.shape) == (0, (0, 15, 45))
    assert found.boxes.shape == (0, 4)


def test_mmdet_s_test_loop_and_scoring(
    plain: tuple[MaskRCNN, nn.Module], images: dict[str, Path], annotated: dict[str, Any]
) -> None:
    model: Any = plain[1]
    data = build_dataset({**model.cfg.data.test, **annotated}, {"test_mode": True})
    loader = build_dataloader(data, samples_per_gpu=1, workers_per_gpu=0, dist=False, shuffle=False)
    results = single_gpu_test(MMDataParallel(model, device_ids=[-1]), loader)
    expected = backend.detect(model, images["landscape"])
    scores = np.concatenate([boxes[:, 4] for boxes in results[0][0]])
    np.testing.assert_allclose(np.sort(scores)[::-1], expected.scores.numpy(), atol=1e-5)
    metrics = data.evaluate(results, metric=["bbox", "segm"])
    assert 0 <= metrics["bbox_mAP"] <= 1


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.name)
def test_mmcv_builds_every_printed_configuration(row: vitadapter_zoo.Row, tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    path.write_text(as_python(mmdet_config(row)))
    config = mmcv.Config.fromfile(str(path))
    with torch.device("meta"):
        model = mmdet.models.build_detector(config.model)
    names = set(standins.contract(row.name))
    if row.schedule == "1x":
        names = {name for name in names if not name.endswith((".gamma1", ".gamma2"))}
    assert set(model.state_dict()) == names


def test_a_training_step_with_the_printed_configuration(annotated: dict[str, Any]) -> None:
    config = mmcv.Config(mmdet_config(get_row("adapter-t-deit-3x")))
    config.model.backbone.pretrained = None
    model = mmdet.models.build_detector(config.model)
    model.init_weights()
    data = build_dataset({**config.data.train, **annotated})
    loader = build_dataloader(data, samples_per_gpu=1, workers_per_gpu=0, dist=False, shuffle=False)
    optimizer = build_optimizer(model, config.optimizer)
    before = {key: value.clone() for key, value in model.named_parameters()}
    outputs = MMDataParallel(model, device_ids=[-1]).train_step(next(iter(loader)), optimizer)
    outputs["loss"].backward()
    optimizer.step()
    assert {"loss_rpn_cls", "loss_bbox", "loss_mask"} <= outputs["log_vars"].keys()
    moved = [key for key, value in model.named_parameters() if not torch.equal(value, before[key])]
    assert any(key.startswith("backbone.blocks.0.") for key in moved)


def test_learning_rates_decay_by_depth() -> None:
    config = mmdet_config(get_row("adapter-b-uniperceiver-3x"))
    with torch.device("meta"):
        model = mmdet.models.build_detector(mmcv.Config(config).model)
    optimizer = build_optimizer(model, mmcv.ConfigDict(config["optimizer"]))
    rates, decays = {}, {}
    for group in optimizer.param_groups:
        for name in group["param_names"]:
            rates[name], decays[name] = group["lr"], group["weight_decay"]
    assert set(rates) == {name for name, _ in model.named_parameters()}
    assert rates["backbone.visual_embed.patch_embed.proj.weight"] == pytest.approx(1e-4 * 0.65**13)
    assert rates["backbone.layers.0.linear1.weight"] == pytest.approx(1e-4 * 0.65**12)
    assert rates["backbone.layers.11.gamma_1"] == pytest.approx(1e-4 * 0.65)
    assert rates["backbone.spm.fc1.weight"] == rates["rpn_head.rpn_cls.bias"] == 1e-4
    assert (
        decays["backbone.layers.0.linear1.weight"],
        decays["backbone.layers.0.linear1.bias"],
    ) == (
        0.05,
        0.0,
    )


# A file as the original project's are: over mmdet's usual base, arguments that only training reads,
# pretraining in a folder that is not there.
ORIGINAL = """
_base_ = ["base.py"]
custom_imports = dict(imports=["vitadapter_zoo.backends.mmdet"])
windowed = [True, True, False] * 4
model = dict(
    backbone=dict(
        _delete_=True, type="ViTAdapter", patch_size=16, embed_dim=192, depth=12, num_heads=3,
        mlp_ratio=4, drop_path_rate=0.1, conv_inplane=64, n_points=4, deform_num_heads=6,
        cffn_ratio=0.25, deform_ratio=1.0, {extra}
        interaction_indexes=[[0, 2], [3, 5], [6, 8], [9, 11]], window_attn=windowed,
        window_size=[14, 14, None] * 4, pretrained="pretrained/deit_tiny.pth"),
    neck=dict(type="FPN", in_channels=[192, 192, 192, 192], out_channels=256, num_outs=5))
optimizer = dict(
    _delete_=True, type="AdamW", lr=0.0001, weight_decay=0.05,
    constructor="LayerDecayOptimizerConstructor",
    paramwise_cfg=dict(num_layers=12, layer_decay_rate=0.65))
"""


@pytest.mark.parametrize(
    ("name", "extra"), [("adapter-t-deit-3x", ""), ("adapter-t-deit-1x", "layer_scale=False,")]
)
def test_original_configuration_files_work_as_they_are(
    name: str,
    extra: str,
    published_file: Callable[[str], Path],
    images: dict[str, Path],
    tmp_path: Path,
) -> None:
    base = mmdet_config(get_row(name))
    base["model"]["backbone"] = {"type": "ResNet", "depth": 50}
    del base["custom_imports"]
    (tmp_path / "base.py").write_text(as_python(base))
    (tmp_path / "original.py").write_text(ORIGINAL.replace("{extra}", extra))
    checkpoint = tmp_path / "original.pth"
    source = published_file(name)
    to_mmdet([source], str(source), get_row(name), checkpoint)
    model = init_detector(str(tmp_path / "original.py"), str(checkpoint), device="cpu")
    assert type(model.backbone).__module__ == "vitadapter_zoo.backends.mmdet.modules"
    found = backend.detect(model, images["tiny"])
    if not extra:
        native = vitadapter_zoo.load(name, checkpoint=source)
        expected = native.predict(images["tiny"])[0]
        assert all(stage.agrees for stage in detection_differences(found, expected))
    assert isinstance(found, Detections)
    optimizer = build_optimizer(model, model.cfg.optimizer)
    assert len({group["lr"] for group in optimizer.param_groups}) == 14


def test_distributed_training_synchronises_batch_norms(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        config = mmdet_config(get_row("adapter-t-deit-3x"))
        with torch.device("meta"):
            model = mmdet.models.build_detector(mmcv.Config(config).model)
    finally:
        torch.distributed.destroy_process_group()
    assert isinstance(model.backbone.norm1, nn.SyncBatchNorm)
    assert not any(type(module) is nn.BatchNorm2d for module in model.modules())


def compare(*arguments: str, code: str | None = None) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", code] if code else [COMMAND]
    return subprocess.run([*command, "compare", *arguments], capture_output=True, text=True)


def test_compare_agrees_and_says_so(
    published_file: Callable[[str], Path], images: dict[str, Path]
) -> None:
    name = "vit-t-deit-3x"
    pictures = [str(images["tiny"]), str(images["grey"])]
    weights = ("--checkpoint", str(published_file(name)))
    result = compare(name, "--images", *pictures, *weights, "--json")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["agree"] is True
    assert [entry["image"] for entry in record["images"]] == pictures
    stages = {stage["stage"]: stage for stage in record["images"][1]["stages"]}
    assert {"input", "backbone.3", "neck.4", "proposals", "boxes", "scores", "masks"} <= set(stages)
    assert all(stage["difference"] <= stage["limit"] for stage in stages.values())


# The command with an mmdet whose neck is slightly off.
BROKEN = """
import sys
from mmdet.models.necks import FPN
right = FPN.forward
FPN.forward = lambda self, maps: tuple(x * 1.001 for x in right(self, maps))
from vitadapter_zoo.cli import main
main(sys.argv[1:])
"""


def test_compare_exits_1_where_the_backends_differ(
    published_file: Callable[[str], Path], images: dict[str, Path]
) -> None:
    name = "vit-t-deit-3x"
    weights = ("--checkpoint", str(published_file(name)))
    result = compare(name, "--images", str(images["tiny"]), *weights, code=BROKEN)
    assert result.returncode == 1, result.stderr
    assert "They differ, first in neck.0." in result.stdout
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    assert "DIFFERS" in lines["neck.0"]
    assert "DIFFERS" not in lines["backbone.3"]


@pytest.mark.parametrize(
    ("broken", "cause"),
    [
        ("raise ImportError('undefined symbol: _ZN3c10')", "undefined symbol"),
        ("__version__ = '2.1.0'", "mmcv.ops"),
    ],
)
def test_a_broken_mmcv_is_one_error(broken: str, cause: str, tmp_path: Path) -> None:
    (tmp_path / "mmcv").mkdir()
    (tmp_path / "mmcv" / "__init__.py").write_text(broken)
    result = subprocess.run(
        [COMMAND, "compare", "vit-t-deit-3x", "--images", str(standins.PHOTO)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert result.returncode == 2
    assert cause in result.stderr
    assert "make mmdet-env" in result.stderr
    assert "Traceback" not in result.stderr


def test_verify_runs_mmdet_s_own_pipeline(tiny: MaskRCNN, tmp_path: Path) -> None:
    model = scenes.small(tiny)
    coco = scenes.write_coco(tmp_path / "coco", model, 4)
    ours = vitadapter_zoo.verify(model, coco)
    theirs = vitadapter_zoo.verify(model, coco, backend="mmdet")
    assert theirs.details["identity"]["backend"] == "mmdet"
    assert theirs.details["run"] != ours.details["run"]
    assert [len(one.scores) for one in theirs.results] == [len(one.scores) for one in ours.results]
    for figure, value in ours.mask.figures.items():
        assert theirs.mask.figures[figure] == pytest.approx(value, abs=0.01)
    assert ours.box.ap > 0.05
    with pytest.raises(ZooError, match="holds another run"):
        vitadapter_zoo.verify(model, coco, backend="mmdet", run=ours.details["run"])
    with pytest.raises(ValueError, match="runs in this process"):
        vitadapter_zoo.verify(model, coco, backend="mmdet", workers=2)
