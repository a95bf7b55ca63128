"""Detectors around timm's vision transformers: trained, saved, loaded and used as any other."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import shapes
import timm
import torch
import trunks
from click.testing import CliRunner
from forked import failure, run, workers
from quick_training import interrupt_when_saved
from safetensors import safe_open

import vitadapter_zoo
from vitadapter_zoo import (
    BackendError,
    CheckpointError,
    ConfigError,
    DatasetError,
    DownloadError,
    MaskRCNN,
    TimmDetector,
    ZooError,
    load,
    save_pretrained,
    train,
)
from vitadapter_zoo.backends.mmdet_config import mmdet_config
from vitadapter_zoo.catalog import timm_row
from vitadapter_zoo.cli import main
from vitadapter_zoo.models import build
from vitadapter_zoo.models.build import build_empty
from vitadapter_zoo.publishing.folder import read_configuration
from vitadapter_zoo.training.backbone import asked_for, starting_around
from vitadapter_zoo.training.memory import checkpoint_blocks
from vitadapter_zoo.training.recipe import Recipe, parameter_groups
from vitadapter_zoo.training.run import TrainingResult
from vitadapter_zoo.training.start import initialize
from vitadapter_zoo.training.state import read_state

pytestmark = pytest.mark.usefixtures("one_thread")

NARROW: dict[str, Any] = {
    "stem_width": 16, "neck_width": 64, "box_width": 128, "mask_convs": 1, "anchor_scale": 4,
    "regions": 32, "finest_scale": 28,
}  # fmt: skip
NANO = TimmDetector(
    trunk="vit_small_patch16_dinov3", adapter="dinov3", frozen=True, dim=64, depth=4, heads=2,
    **NARROW,
)  # fmt: skip
QUICK: dict[str, Any] = {
    "input_size": (64, 64), "batch_size": 2, "lr": 2e-3, "clip": 5, "augment": "none",
    "schedule": "cosine", "eval_every": 1000, "workers": 0, "device": "cpu", "progress": False,
}  # fmt: skip
PREDICT = """
import sys, torch, vitadapter_zoo
torch.set_num_threads(1)
found = vitadapter_zoo.load(sys.argv[1]).predict(sys.argv[2], score_threshold=0.05)[0]
torch.save([found.boxes, found.scores, found.labels], sys.argv[3])
"""


@pytest.fixture(scope="module")
def learnt(data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    out = tmp_path_factory.mktemp("runs") / "run"
    return train(backbone=NANO, data=data, out=out, epochs=25, ema=0.9, start="scratch", **QUICK)


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of test_vit2's weights in huggingface_hub's cache, and no network."""
    monkeypatch.setenv("VITADAPTER_ZOO_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "models--timm--test_vit2.r160_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    file = folder / "snapshots" / ("0" * 40) / "model.safetensors"
    file.parent.mkdir(parents=True)
    trunk = trunks.shaken(timm.create_model("test_vit2", num_classes=5))
    safetensors.torch.save_file(trunk.state_dict(), file)
    return file


def around_test_vit2(**changes: Any) -> TimmDetector:
    return replace(
        TimmDetector(trunk="timm/test_vit2", adapter="dinov3", frozen=True, **NARROW), **changes
    )


def briefly(data: Path, out: Path, network: TimmDetector, **more: Any) -> TrainingResult:
    return train(backbone=network, data=data, out=out, **{**QUICK, "epochs": 1, **more})


def started(network: TimmDetector, **more: Any) -> MaskRCNN:
    """The detector that a training would start with."""
    given = {"adapter": None, "checkpoint": None, "freeze": None, "start": "published", **more}
    asked = asked_for(None, network, **given)
    assert asked
    return starting_around(asked, shapes.CLASSES, input_size=(64, 64), progress=False)[0].eval()


def parts(model: MaskRCNN) -> tuple[Any, Any]:
    """Backbone and trunk of a detector around a timm model."""
    backbone: Any = model.backbone
    return backbone, backbone.backbone


def settings(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def predicts_the_same_elsewhere(folder: Path, picture: Path, tmp_path: Path) -> None:
    """In a process that knows only the folder."""
    ours = load(folder).predict(picture, score_threshold=0.05)[0]
    done = workers().run(PREDICT, str(folder), str(picture), str(tmp_path / "found.pt"))
    assert done.returncode == 0, done.stderr
    theirs = torch.load(tmp_path / "found.pt")
    assert len(ours.boxes) >= 2
    for a, b in zip((ours.boxes, ours.scores, ours.labels), theirs, strict=True):
        assert torch.equal(a, b)


def test_dinov3_s_arrangement_learns_four_images(
    learnt: TrainingResult, data: Path, tmp_path: Path
) -> None:
    assert learnt.figures["box_ap50"] > 90
    assert learnt.figures["mask_ap"] > 60
    predicts_the_same_elsewhere(learnt.best, data / "train2017" / "000.png", tmp_path)


@pytest.mark.slow
def test_the_paper_s_arrangement_learns_four_images(data: Path, tmp_path: Path) -> None:
    network = replace(NANO, adapter="paper", frozen=False)
    found = briefly(data, tmp_path / "run", network, epochs=25, ema=0.9, start="scratch")
    assert found.figures["box_ap50"] > 90
    assert found.figures["mask_ap"] > 60
    predicts_the_same_elsewhere(found.best, data / "train2017" / "000.png", tmp_path)


def test_a_frozen_trunk_stays_and_is_in_the_state_once(learnt: TrainingResult) -> None:
    state = read_state(learnt.directory)
    assert state
    torch.manual_seed(0)
    fresh = build(timm_row(NANO), shapes.CLASSES).state_dict()
    last = load(learnt.last).state_dict()
    trunk = [name for name in fresh if name.startswith("backbone.backbone.")]
    assert trunk
    for name in trunk:
        assert torch.equal(last[name], fresh[name])
        assert name in state["model"]
        assert name not in state["average"]
    adapter = "backbone.interactions.0.extractor.attn.value_proj.weight"
    assert not torch.equal(last[adapter], fresh[adapter])


def test_commands_take_the_folder_as_any_other(
    learnt: TrainingResult, data: Path, tmp_path: Path
) -> None:
    folder = str(learnt.best)
    described = run("info", folder)
    assert "DINOv3's adapter around timm's vit_small_patch16_dinov3 with Mask" in described.stdout
    assert "frozen, from scratch" in described.stdout
    record = json.loads(run("info", folder, "--json").stdout)
    assert record["network"]["adapter"] == "dinov3"
    assert record["box_ap"] is None
    annotations, images = learnt.directory / "valid.json", data / "val2017"
    done = run("verify", folder, "--annotations", str(annotations), "--images", str(images),
               "--report", str(tmp_path / "report"))  # fmt: skip
    assert done.returncode == 3, done.stderr  # nothing was published to compare with
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    # The file gives the average; the run measured it too.
    assert 100 * report["mask"]["figures"]["AP"] == pytest.approx(learnt.figures["mask_ap"])
    card = run("card", folder, "--report", str(tmp_path / "report" / "report.json"))
    assert "mask AP" in card.stdout, card.stderr
    out = tmp_path / "one.safetensors"
    done = run("convert", folder, "--out", str(out), "--dtype", "float16")
    assert done.returncode == 0, done.stderr
    with safe_open(out, "pt") as file:
        assert set(file.keys()) == set(load(folder).state_dict())
    assert "mmdet 2.x does not have" in failure("convert", folder, "--format", "mmdet")
    with pytest.raises(BackendError, match=r"mmdet 2\.x has no such network"):
        mmdet_config(load(folder).row)
    with pytest.raises(DatasetError, match="no data set belongs to"):
        vitadapter_zoo.verify(load(folder), progress=False)


def test_other_classes_and_a_second_training(
    learnt: TrainingResult, data: Path, tmp_path: Path
) -> None:
    model = load(learnt.best, classes=["square", "star"])
    assert model.categories == ("square", "star")
    assert model.backbone.frozen
    found = train(learnt.best, data, tmp_path / "more", epochs=1, **{**QUICK, "lr": 1e-5})
    assert found.figures["box_ap50"] > 90
    row = load(found.last).row
    assert row.network == replace(NANO, weights=None)


def test_the_trunk_s_weights_are_stored_or_referred_to(
    data: Path, tmp_path: Path, published: Path
) -> None:
    referred = briefly(data, tmp_path / "run", around_test_vit2(), reference_backbone=True)
    stored = save_pretrained(load(referred.best), tmp_path / "stored")
    for folder, is_stored in ((stored, True), (referred.best, False)):
        network = settings(folder)["network"]
        assert network["stored"] == is_stored
        assert network["weights"] == "timm/test_vit2.r160_in1k"
        assert network["license"] == "apache-2.0"
        with safe_open(folder / "model.safetensors", "pt") as file:
            names = set(file.keys())
        assert any(name.startswith("backbone.backbone.") for name in names) == is_stored
    state = read_state(referred.directory)
    assert state
    assert not any(name.startswith("backbone.backbone.") for name in state["model"])
    model = load(referred.best)
    weights = model.state_dict()
    for name, value in load(stored).state_dict().items():
        assert torch.equal(weights[name], value)
    original = safetensors.torch.load_file(published)["blocks.3.mlp.fc1.weight"]
    assert torch.equal(weights["backbone.backbone.blocks.3.mlp.fc1.weight"], original)
    save_pretrained(model, tmp_path / "again", reference_backbone=True)
    card = (referred.best / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "They are not in this folder" in card
    assert "not stored here" in run("info", str(referred.best)).stdout
    out = ["--out", str(tmp_path / "all.safetensors")]
    # In this process, which has the cache of the fixture.
    done = CliRunner().invoke(main, ["convert", str(referred.best), *out])
    assert done.exit_code == 0, done.output
    with safe_open(tmp_path / "all.safetensors", "pt") as file:
        assert len(file.keys()) == len(weights)


def test_a_trunk_that_is_another_or_absent_is_told(tmp_path: Path, published: Path) -> None:
    folder = save_pretrained(
        started(around_test_vit2()), tmp_path / "folder", reference_backbone=True
    )
    changed = safetensors.torch.load_file(published)
    changed["blocks.0.norm1.bias"] += 1
    kept = shutil.copy(published, tmp_path / "kept.safetensors")
    safetensors.torch.save_file(changed, published)
    with pytest.raises(CheckpointError, match=r"sha256 .* has .*: give the file that the detector"):
        load(folder)
    assert load(folder, checkpoint=kept).row.network
    published.unlink()
    with pytest.raises(DownloadError, match=r"looked for as timm/test_vit2.r160_in1k in .*hub"):
        load(folder)
    model = load(folder, checkpoint=kept)
    with torch.no_grad():
        parts(model)[1].blocks[0].norm1.bias += 1
    with pytest.raises(ConfigError, match="not as they were read"):
        save_pretrained(model, tmp_path / "other", reference_backbone=True)


def test_without_weights_the_error_says_where_they_were_looked_for(
    data: Path, tmp_path: Path, published: Path
) -> None:
    published.unlink()
    out = tmp_path / "run"
    message = failure("train", "--backbone", "timm/test_vit2", "--data", str(data), "--out",
                      str(out), "--offline")  # fmt: skip
    assert "looked for as timm/test_vit2.r160_in1k in " in message
    assert "--from scratch" in message
    assert not (out / "last").exists()
    with pytest.raises(ConfigError, match=r"with another dim, depth or heads: give a file"):
        briefly(data, out, NANO)


def test_the_authors_file_with_its_rounded_periods(tmp_path: Path) -> None:
    trunk = trunks.tiny("vit_small_patch16_dinov3")
    rounded = trunk.rope.periods.bfloat16().float()
    assert not torch.equal(rounded, trunk.rope.periods)
    trunk.rope.periods.copy_(rounded)
    file = trunks.save(trunks.authors_names(trunk), tmp_path / "dinov3_vits16.pth")
    tensors = torch.load(file)
    for name in [name for name in tensors if name.endswith("qkv.bias")]:
        del tensors[name], tensors[f"{name}_mask"]
    torch.save(tensors, file)
    folder = save_pretrained(started(NANO, checkpoint=file), tmp_path / "folder")
    model = load(folder)
    assert torch.equal(parts(model)[1].rope.periods, rounded)
    assert settings(folder)["network"]["weights"] == "dinov3_vits16.pth"
    assert "license: unknown" in (folder / "README.md").read_text()
    half = load(folder, dtype=torch.bfloat16)
    assert torch.equal(parts(half)[1].rope.periods, rounded)


@pytest.mark.slow
def test_resumed_runs_end_with_the_same_weights(
    data: Path, tmp_path: Path, published: Path
) -> None:
    more = {"epochs": 3, "ema": 0.9, "reference_backbone": True, "save_minutes": 1e-6}
    whole = briefly(data, tmp_path / "whole", around_test_vit2(drop_path=0.2), **more)
    half = tmp_path / "half"
    interrupt_when_saved(half, 1)
    with pytest.raises(KeyboardInterrupt):
        briefly(data, half, around_test_vit2(drop_path=0.2), resume=True, **more)
    state = read_state(half)
    assert state
    assert 0 < state["step"] < 6
    rest = briefly(data, half, around_test_vit2(drop_path=0.2), resume=True, **more)
    ours, theirs = (load(one.last).state_dict() for one in (whole, rest))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    published.unlink()
    with pytest.raises(DownloadError, match="looked for"):  # the state refers to the trunk too
        briefly(data, half, around_test_vit2(drop_path=0.2), resume=True, **more)


def gradients(network: TimmDetector, *, checkpointed: bool = False) -> tuple[MaskRCNN, list[Any]]:
    torch.manual_seed(0)
    model = build(timm_row(network), ("a", "b"))
    initialize(model)
    trunks.shaken(model.backbone)
    model.train()
    if checkpointed:
        checkpoint_blocks(model.backbone)
    torch.manual_seed(1)
    maps = model.backbone(torch.randn(2, 3, 64, 96))
    sum(level.square().sum() for level in maps).backward()
    return model, [parameter.grad for parameter in model.backbone.parameters()]


@pytest.mark.parametrize("adapter", ["paper", "dinov3"])
@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_of_frozen_and_trained_trunks(adapter: str, frozen: bool) -> None:
    network = replace(NANO, adapter=adapter, frozen=frozen)
    model, _ = gradients(network)
    backbone, inner = parts(model)
    trunk = dict(inner.named_parameters())
    assert all(x.grad is None for x in trunk.values()) == frozen
    assert not frozen or not any(x.requires_grad for x in trunk.values())
    for name, parameter in model.backbone.named_parameters():
        if not name.startswith("backbone."):
            assert parameter.grad is not None
            assert parameter.grad.any(), name
    if adapter == "dinov3":
        layers = backbone.layers(torch.randn(1, 3, 64, 64))
        assert all(layer.requires_grad != frozen for layer in layers)
    drawing = replace(network, drop_path=0.2)
    plain, again = (gradients(drawing, checkpointed=each)[1] for each in (False, True))
    for a, b in zip(plain, again, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_layer_decay_and_checkpoints_fit_or_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"--layer-decay lowers .* the trunk is frozen"):
        briefly(data, tmp_path / "run", NANO, start="scratch", layer_decay=0.8)
    windowed = build(timm_row(replace(NANO, adapter="paper", depth=8, windows=True)), ("a",))
    with pytest.raises(ZooError, match="does not work with windows"):
        checkpoint_blocks(windowed.backbone)
    model = build(timm_row(replace(NANO, frozen=False)), ("a",))
    groups = parameter_groups(model, Recipe(layer_decay=0.5))
    scale = {id(x): group["lr_scale"] for group in groups for x in group["params"]}
    backbone, trunk = parts(model)
    assert scale[id(trunk.patch_embed.proj.weight)] == 0.5**5
    assert scale[id(trunk.cls_token)] == 0.5**5
    assert scale[id(trunk.blocks[0].mlp.fc1.weight)] == 0.5**4
    assert scale[id(trunk.blocks[3].mlp.fc1.weight)] == 0.5
    assert scale[id(backbone.up.weight)] == 1


@pytest.mark.parametrize("name", trunks.ARCHITECTURES)
def test_a_detector_without_memory_has_the_trunk_s_own_buffers(name: str) -> None:
    network = TimmDetector(trunk=name, dim=64, depth=4, heads=2, **NARROW)
    empty, whole = build_empty(timm_row(network), ("a",)), build(timm_row(network), ("a",))
    saved = whole.state_dict()
    for key, buffer in whole.named_buffers():
        if key not in saved:
            assert torch.equal(empty.get_buffer(key), buffer), key
    empty.load_state_dict(saved, assign=True)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for a, b in zip(empty.eval().backbone(image), whole.eval().backbone(image), strict=True):
            assert torch.equal(a, b)


def test_arguments_that_exclude_each_other() -> None:
    def ask(**given: Any) -> None:
        name, backbone = given.pop("name", None), given.pop("backbone", "test_vit2")
        rest = {"adapter": None, "checkpoint": None, "freeze": None, "start": "published", **given}
        asked_for(name, backbone, **rest)

    for given, message in (
        ({"backbone": None}, "give the name of a detector, or the backbone"),
        ({"name": "adapter-n-emoji"}, "not both"),
        ({"name": "adapter-n-emoji", "backbone": None, "adapter": "paper"}, "adapter belongs to"),
        ({"adapter": "dinov2"}, "must be one of 'paper' and 'dinov3'"),
        ({"checkpoint": "x.pth", "start": "scratch"}, "leave it out"),
        ({"backbone": NANO, "adapter": "paper"}, "leave adapter and freeze_backbone out"),
        ({"backbone": replace(NANO, depth=3)}, r"depth is 3; it must be an integer from 4 to 128"),
        ({"backbone": replace(NANO, windows=True)}, "windows is True; it must be false for DINOv3"),
    ):
        with pytest.raises(ConfigError, match=message):
            ask(**given)
    with pytest.raises(ZooError, match="did you mean"):
        ask(backbone="timm/test_vit22")


def test_a_reference_needs_a_frozen_trunk_from_a_file(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match="not read from a file of pretrained weights"):
        briefly(data, out, NANO, start="scratch", reference_backbone=True)
    with pytest.raises(ConfigError, match=r"freeze the trunk \(--freeze-backbone\)"):
        briefly(data, out, replace(NANO, frozen=False), start="scratch", reference_backbone=True)
    with pytest.raises(ConfigError, match="for detectors around a timm model, not for adapter-n"):
        train("adapter-n-emoji", data, out, start="scratch", reference_backbone=True, **QUICK)


@pytest.mark.parametrize(
    ("key", "value", "range_"),
    [
        ("trunk", 5, "a text of 1 to 200"),
        ("trunk", "a\nb", "a text of 1 to 200"),
        ("adapter", "dinov2", "'paper' or 'dinov3'"),
        ("frozen", 1, "true or false"),
        ("stored", False, "true unless the trunk is frozen and weights"),
        ("drop_path", 0.95, "0 to 0.9"),
        ("drop_path", "0.1", "0 to 0.9"),
        ("dim", 1e9, "32 to 8192"),
        ("depth", 4.5, "4 to 128"),
        ("heads", True, "1 to 256"),
        ("stem_width", 0, "8 to 512"),
        ("neck_width", 4096, "16 to 1024"),
        ("box_width", -1, "16 to 8192"),
        ("mask_convs", 99, "1 to 16"),
        ("anchor_scale", None, "1 to 64"),
        ("regions", 0, "1 to 8192"),
        ("finest_scale", 1e6, "1 to 1024"),
        ("sha256", "A" * 64, "64 hexadecimal digits"),
        ("license", "x" * 300, "a text of 1 to 200"),
        ("periods", [], "1 to 1024 numbers"),
        ("periods", [1.0, 0.0], "1e-06 to 1e+09"),
        ("code", "import os", "settings that this version knows"),
    ],
)
def test_every_setting_of_a_folder_has_a_range(
    key: str, value: object, range_: str, learnt: TrainingResult, tmp_path: Path
) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(learnt.best / name, tmp_path / name)
    content = settings(tmp_path)
    content["network"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        read_configuration(tmp_path)
    message = str(caught.value)
    assert "config.json: network" in message
    assert key in message
    assert range_ in message
    assert len(message) < 700


def test_weights_of_another_network_are_refused(learnt: TrainingResult, tmp_path: Path) -> None:
    folder = shutil.copytree(learnt.best, tmp_path / "copy")
    content = settings(folder)
    content["network"]["dim"] = 96
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="of another shape"):
        load(folder)
    with pytest.raises(ConfigError, match="has to be a multiple of the heads"):
        build(timm_row(TimmDetector(trunk="vit_small_patch16_224", dim=96, depth=4, heads=5)))


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["paper", "dinov3"])
def test_export_to_onnx(adapter: str, learnt: TrainingResult, tmp_path: Path) -> None:
    model = load(learnt.best)
    if adapter == "paper":
        model = build(replace(model.row, network=replace(NANO, adapter="paper")), ("a", "b"))
        initialize(model)
        trunks.shaken(model.backbone)
        model.eval()
    found = vitadapter_zoo.export(model, tmp_path, sizes=[(64, 64)])
    assert all(one.agrees for one in found[0].differences)
