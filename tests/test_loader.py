"""`load`: every source of weights, strict errors, and what the loaded detector is."""

import contextlib
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import standins
import torch
from forked import workers
from helpers import RunsCode, left_behind, same_weights

import vitadapter_zoo
from vitadapter_zoo import CheckpointError, UnknownModelError, UnsafeCheckpointError, ZooError

NAME = "adapter-t-deit-3x"
MakeFile = Callable[[str], Path]


def test_a_published_file_loads_converts_and_is_reused(
    published_file: MakeFile, zoo_home: Path
) -> None:
    source = published_file(NAME)
    before = source.read_bytes()
    model = vitadapter_zoo.load(NAME, checkpoint=source)
    assert same_weights(model, NAME)
    assert not model.training
    assert not any(value.is_meta for value in model.state_dict().values())
    assert source.read_bytes() == before

    (weights,) = zoo_home.rglob("*.safetensors")
    (record,) = zoo_home.rglob("*.json")
    provenance = json.loads(record.read_text())
    assert provenance["source"] == str(source)
    assert provenance["container"] == "torch zip"
    assert provenance["size"] == weights.stat().st_size
    assert provenance["metadata"]["epoch"] == 36
    assert left_behind(zoo_home) == sorted([weights.name, record.name])

    written = weights.stat().st_mtime_ns
    assert same_weights(vitadapter_zoo.load(NAME, checkpoint=str(source)), NAME)
    assert weights.stat().st_mtime_ns == written


def test_mapped_weights_can_be_trained_without_touching_the_cache(
    published_file: MakeFile, zoo_home: Path
) -> None:
    model = vitadapter_zoo.load(NAME, checkpoint=published_file(NAME))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert same_weights(vitadapter_zoo.load(NAME, checkpoint=published_file(NAME)), NAME)


def test_a_changed_local_file_is_converted_again(published_file: MakeFile, tmp_path: Path) -> None:
    path = tmp_path / "mine.pth"
    path.write_bytes(published_file(NAME).read_bytes())
    vitadapter_zoo.load(NAME, checkpoint=path)
    state = standins.state_dict(NAME)
    state["rpn_head.rpn_cls.bias"] += 1
    torch.save(state, path)
    loaded = vitadapter_zoo.load(NAME, checkpoint=path).state_dict()
    assert torch.equal(loaded["rpn_head.rpn_cls.bias"], state["rpn_head.rpn_cls.bias"])


def test_a_damaged_cache_entry_is_converted_again(published_file: MakeFile, zoo_home: Path) -> None:
    vitadapter_zoo.load(NAME, checkpoint=published_file(NAME))
    (weights,) = zoo_home.rglob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    assert same_weights(vitadapter_zoo.load(NAME, checkpoint=published_file(NAME)), NAME)
    (record,) = zoo_home.rglob("*.json")
    record.write_text("{")
    assert same_weights(vitadapter_zoo.load(NAME, checkpoint=published_file(NAME)), NAME)


@pytest.mark.parametrize("legacy", [False, True])
def test_containers_prefixes_optimizers_and_half_precision(tmp_path: Path, legacy: bool) -> None:
    state = standins.state_dict(NAME)
    content: dict[str, Any] = {
        "meta": {"epoch": 12, "CLASSES": ("person",), "hook_msgs": {"best": np.float32(0.4)}},
        "state_dict": {
            f"module.{name}": value.half() if value.is_floating_point() else value
            for name, value in state.items()
        },
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]},
    }
    path = tmp_path / "weights.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    model = vitadapter_zoo.load(NAME, checkpoint=path)
    for name, value in model.state_dict().items():
        expected = state[name]
        if expected.is_floating_point():
            expected = expected.half().float()
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected)


def test_numpy_1_scalars_in_the_metadata(tmp_path: Path) -> None:
    # numpy 1.x pickled its scalars under numpy.core; the name is of the same length when padded,
    # so a zip member is rewritten with the old name.
    new, old = tmp_path / "new.pth", tmp_path / "old.pth"
    torch.save(standins.checkpoint(NAME), new)
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(old, "w", zipfile.ZIP_STORED) as target:
        for member in source.infolist():
            data = source.read(member)
            if member.filename.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in data
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            target.writestr(member, data)
    assert same_weights(vitadapter_zoo.load(NAME, checkpoint=old), NAME)


def test_safetensors_are_used_in_place(tmp_path: Path, zoo_home: Path) -> None:
    path = tmp_path / "mine.safetensors"
    safetensors.torch.save_file(standins.state_dict(NAME), path)
    assert same_weights(vitadapter_zoo.load(NAME, checkpoint=path), NAME)
    assert left_behind(zoo_home) == []


def test_layer_scales_are_filled_for_the_one_row_and_reported(
    tmp_path: Path, zoo_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "adapter-t-deit-1x"
    state = standins.state_dict(name)
    scales = [key for key in state if ".blocks." in key and "gamma" in key]
    assert len(scales) == 24
    path = tmp_path / "1x.pth"
    torch.save({key: value for key, value in state.items() if key not in scales}, path)
    loaded = vitadapter_zoo.load(name, checkpoint=path).state_dict()
    assert all((loaded[key] == 1).all() for key in scales)
    (record,) = zoo_home.rglob("*.json")
    assert json.loads(record.read_text())["filled"] == scales
    assert "lacks 24 parameters that change nothing" in caplog.text
    # Part of them absent is a wrong file, and so is any absence in another row.
    state.pop(scales[0])
    torch.save(state, path)
    for wrong in (name, NAME):
        with pytest.raises(CheckpointError, match=r"1 missing:\n    backbone\.blocks\.0\.gamma1"):
            vitadapter_zoo.load(wrong, checkpoint=path)


def test_uniperceiver_layer_scales_are_never_filled(tmp_path: Path) -> None:
    name = "adapter-b-uniperceiver-3x"
    path = tmp_path / "uni.pth"
    state = {key: torch.zeros(shape) for key, shape in standins.contract(name).items()}
    torch.save({k: v for k, v in state.items() if not k.endswith(("gamma_1", "gamma_2"))}, path)
    with pytest.raises(CheckpointError, match="24 missing"):
        vitadapter_zoo.load(name, checkpoint=path)


def test_absent_batch_counters_are_zero(tmp_path: Path) -> None:
    state = standins.state_dict(NAME)
    path = tmp_path / "old.pth"
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, path)
    assert same_weights(vitadapter_zoo.load(NAME, checkpoint=path), NAME)


def test_a_dinov2_row_loads_and_finds_objects(published_file: MakeFile) -> None:
    file = published_file("adapter-s-dinov2-3x")
    model = vitadapter_zoo.load("adapter-s-dinov2-3x", checkpoint=file)
    assert same_weights(model, "adapter-s-dinov2-3x")
    # The grid of 37 x 37 position embeddings is resized to the image's; the class token's has no
    # effect.
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = model.backbone(image)
        for token, has_effect in ((0, False), (1 + 4 * 37 + 3, True)):
            model.get_parameter("backbone.pos_embed")[:, token] += 5
            after = model.backbone(image)
            assert torch.equal(after[2], before[2]) is not has_effect
    # The networks of other pretrainings have the same names, and this size has the same shapes but
    # for the position embeddings.
    with pytest.raises(CheckpointError, match="The file fits adapter-s-dinov2-3x: load it under"):
        vitadapter_zoo.load("adapter-s-deit-3x", checkpoint=file)


def test_options_for_device_dtype_and_fresh_weights(published_file: MakeFile) -> None:
    half = vitadapter_zoo.load(NAME, checkpoint=published_file(NAME), dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert len(half.predict(standins.PHOTO)) == 1
    fresh = vitadapter_zoo.load(NAME, pretrained=False)
    assert not any(p.is_meta for p in fresh.parameters())
    assert not same_weights(fresh, NAME)
    with pytest.raises(ValueError, match="leave one of them out"):
        vitadapter_zoo.load(NAME, pretrained=False, checkpoint="x.pth")


EMOJI = "adapter-n-emoji"


@pytest.mark.parametrize("state", ["float64", "float16", "meta", "inference"])
@pytest.mark.parametrize(
    "options", [{}, {"classes": ["dog", "zebra"]}, {"pretrained": False}], ids=str
)
def test_no_state_of_the_process_changes_what_is_loaded(
    options: dict[str, Any], state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another library's default dtype or device, or inference mode around the call."""
    torch.manual_seed(0)
    wanted = vitadapter_zoo.load(EMOJI, **options).state_dict()
    torch.manual_seed(0)
    with contextlib.ExitStack() as ambient:
        if state == "meta":
            ambient.enter_context(torch.device("meta"))
        elif state == "inference":
            ambient.enter_context(torch.inference_mode())
        else:
            ambient.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(getattr(torch, state))
        model = vitadapter_zoo.load(EMOJI, **options)
    for name, value in model.state_dict().items():
        assert value.dtype == wanted[name].dtype
        assert torch.equal(value, wanted[name])
    image = model.preprocess(standins.PHOTO).tensor[:, :, :64, :64]
    sum(x.mean() for x in model.neck(model.backbone(image))).backward()  # it can be trained
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare pickle"])
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, zoo_home: Path, kind: str) -> None:
    proof, path = tmp_path / "it-ran", tmp_path / "evil.pth"
    content = {"state_dict": standins.state_dict("vit-t-deit-3x"), "meta": RunsCode(proof)}
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps(RunsCode(proof)))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(UnsafeCheckpointError, match=r"Nothing in it was run"):
        vitadapter_zoo.load(NAME, checkpoint=path)
    assert not proof.exists()
    assert left_behind(zoo_home) == []
    if kind == "legacy":  # the file does run code where it is read without care
        torch.load(path, weights_only=False)
        assert proof.exists()


def damaged(kind: str, path: Path, good: Path) -> str:
    """Write a bad file of that kind; return the text that its error must contain."""
    data = good.read_bytes()
    state = standins.state_dict(NAME)
    messages = {
        "truncated": "damaged or truncated torch file",
        "truncated safetensors": "damaged or truncated safetensors file",
        "html": "is a web page",
        "text": "is not a checkpoint",
        "empty": "is not a checkpoint",
        "another row": "The file fits vit-t-deit-3x: load it under that name",
        "one missing": r"1 missing:\n    roi_head\.mask_head\.upsample\.bias",
        "one more": r"1 unexpected:\n    head\.weight",
        "wrong shape": r"1 of another shape:\n    backbone\.level_embed \(file \[4, 192\], model",
        "wrong kind": r"1 of another kind:\n    backbone\.level_embed \(file torch\.int32",
        "old release": r"release v0\.1\.2",
        "not tensors": "'epoch' is not a tensor",
        "a list": "holds no state_dict",
    }
    if kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "truncated safetensors":
        path.write_bytes(safetensors.torch.save(state)[:-100])
    elif kind in ("html", "text", "empty"):
        content = {"html": "\n<!DOCTYPE html><html>", "text": "hello there", "empty": ""}
        path.write_text(content[kind])
    elif kind == "another row":
        torch.save(standins.checkpoint("vit-t-deit-3x"), path)
    elif kind == "a list":
        torch.save([1, 2], path)
    else:
        if kind == "one missing":
            state.pop("roi_head.mask_head.upsample.bias")
        elif kind == "one more":
            state["head.weight"] = torch.zeros(3)
        elif kind == "wrong shape":
            state["backbone.level_embed"] = torch.zeros(4, 192)
        elif kind == "wrong kind":
            state["backbone.level_embed"] = state["backbone.level_embed"].int()
        elif kind == "old release":
            state["neck.lateral_convs.0.bn.weight"] = torch.zeros(256)
        content_to_save: dict[str, Any] = dict(state)
        if kind == "not tensors":
            content_to_save["epoch"] = 3
        torch.save(content_to_save, path)
    return messages[kind]


BAD_FILES = [
    "truncated",
    "truncated safetensors",
    "html",
    "text",
    "empty",
    "another row",
    "one missing",
    "one more",
    "wrong shape",
    "wrong kind",
    "old release",
    "not tensors",
    "a list",
]


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_have_one_clear_error_and_leave_nothing(
    kind: str, tmp_path: Path, zoo_home: Path, published_file: MakeFile
) -> None:
    path = tmp_path / "bad.pth"
    message = damaged(kind, path, published_file(NAME))
    with pytest.raises(CheckpointError, match=message):
        vitadapter_zoo.load(NAME, checkpoint=path)
    assert left_behind(zoo_home) == []
    assert path.exists()


def test_missing_files_and_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint file"):
        vitadapter_zoo.load(NAME, checkpoint=tmp_path / "none.pth")
    with pytest.raises(UnknownModelError, match="did you mean"):
        vitadapter_zoo.load("adapter-t-deit-2x")


def test_an_unwritable_cache_is_an_error(published_file: MakeFile, tmp_path: Path) -> None:
    blocked = tmp_path / "a-file"
    blocked.write_text("")
    with pytest.raises(ZooError, match=r"cannot write to .*VITADAPTER_ZOO_HOME"):
        vitadapter_zoo.load(NAME, checkpoint=published_file(NAME), cache_dir=blocked / "cache")


def test_a_full_disk_is_an_error(published_file: MakeFile, zoo_home: Path) -> None:
    # A file-size limit makes the write fail as a full disk does, in a process of its own.
    script = (
        "import resource, signal, sys, vitadapter_zoo as zoo\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "try:\n    zoo.load(sys.argv[1], checkpoint=sys.argv[2])\n"
        "except zoo.ZooError as error:\n    print(error)\n"
    )
    result = workers().run(script, NAME, str(published_file(NAME)))
    assert "cannot write" in result.stdout, result
    assert left_behind(zoo_home) == []


PEAK = """
import sys
from helpers import RunsCode, forget_the_peak, resident
from vitadapter_zoo import load

load("adapter-t-deit-3x", pretrained=False)
forget_the_peak()
before = resident("VmRSS")
model = load("adapter-l-augreg-3x", checkpoint=sys.argv[1])
if sys.argv[2] == "touch":
    print(sum(float(value.double().sum()) for value in model.state_dict().values()))
print((resident("VmHWM") - before) / 1e6)
"""


def test_loading_the_largest_model_peaks_below_1_15_of_its_weights(tmp_path: Path) -> None:
    contract = standins.contract("adapter-l-augreg-3x")
    state = {
        name: torch.ones(shape, dtype=torch.int64 if name.endswith("tracked") else torch.float32)
        for name, shape in contract.items()
    }
    path = tmp_path / "large.pth"
    torch.save({"state_dict": state, "meta": {}}, path)
    weights = sum(value.nbytes for value in state.values()) / 1e6
    del state
    for mode in ("load", "touch"):  # the first converts, the second finds the cache warm
        result = workers().run(PEAK, str(path), mode)
        assert result.returncode == 0, result.stderr
        peak = float(result.stdout.split()[-1])
        print(f"{mode}: peak {peak:.0f} MB, weights {weights:.0f} MB, ratio {peak / weights:.2f}")
        assert peak < 1.15 * weights
