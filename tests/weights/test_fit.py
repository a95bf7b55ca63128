"""Names, dtypes and values of foreign checkpoints against a network of a few parameters."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from vitadapter_zoo import CheckpointError
from vitadapter_zoo.weights import checkpoint
from vitadapter_zoo.weights.fit import fit, separate

NAME = "adapter-t-deit-3x"
EXPECTED = {
    "backbone.a.weight": torch.empty(2, 3, device="meta"),
    "neck.b.bias": torch.empty(4, device="meta"),
    "backbone.bn.num_batches_tracked": torch.empty((), dtype=torch.int64, device="meta"),
}


def weights() -> dict[str, Tensor]:
    return {
        "backbone.a.weight": torch.arange(6.0).view(2, 3),
        "neck.b.bias": torch.ones(4),
        "backbone.bn.num_batches_tracked": torch.tensor(7),
    }


def through(kind: str, tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    path = folder / "file"
    if kind == "safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    return checkpoint.read(path, "it").tensors


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize(
    ("before", "inside"),
    [
        ("module.", ""),
        ("_orig_mod.", ""),
        ("model.", ""),
        ("module._orig_mod.", ""),
        ("model.module.", ""),
        ("ema_model.module.", ""),
        ("model_ema.", ""),
        ("", "_orig_mod."),
        ("", "_checkpoint_wrapped_module."),
        ("_fsdp_wrapped_module.", "_fsdp_wrapped_module."),
    ],
)
def test_known_wrappers_are_removed_from_every_container(
    before: str, inside: str, kind: str, tmp_path: Path
) -> None:
    wrapped = {
        f"{before}{name.replace('.', f'.{inside}', 1)}": value for name, value in weights().items()
    }
    fitted = fit(through(kind, wrapped, tmp_path), EXPECTED, NAME)
    assert all(torch.equal(fitted.tensors[name], value) for name, value in weights().items())
    assert fitted.removed == [before + inside]


def test_counters_of_averages_are_left_out_and_said() -> None:
    averaged = {f"module.{name}": value for name, value in weights().items()}
    fitted = fit(averaged | {"n_averaged": torch.tensor(3)}, EXPECTED, NAME)
    assert fitted.ignored == ["n_averaged"]
    mmcv = {f"ema_{name.replace('.', '_')}": value for name, value in weights().items()}
    fitted = fit(weights() | mmcv, EXPECTED, NAME)
    assert sorted(fitted.ignored) == sorted(mmcv)


@pytest.mark.parametrize("prefix", ["module.", "ema.", "model._orig_mod."])
def test_two_values_for_one_name_are_refused(prefix: str) -> None:
    both = {**weights(), f"{prefix}neck.b.bias": torch.zeros(4)}
    with pytest.raises(CheckpointError, match=r"two values for one name: 'neck\.b\.bias' and"):
        fit(both, EXPECTED, NAME)


def test_an_unknown_prefix_is_an_error_that_shows_names_safely() -> None:
    wrong = {f"evil\x1b[2J{'n' * 1_000_000}.{name}": value for name, value in weights().items()}
    with pytest.raises(CheckpointError, match="2 missing") as caught:
        fit(wrong, EXPECTED, NAME)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_value_that_is_not_finite_is_refused_with_its_name(
    value: float, dtype: torch.dtype, kind: str, tmp_path: Path
) -> None:
    given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in weights().items()}
    given["neck.b.bias"][2] = value
    found = through(kind, given, tmp_path)
    with pytest.raises(CheckpointError, match=r"1 not finite:\n    neck\.b\.bias"):
        fit(found, EXPECTED, NAME)
    kept = fit(found, EXPECTED, NAME, allow_nonfinite=True).tensors["neck.b.bias"][2]
    assert torch.equal(kept, torch.tensor(value)) or kept.isnan()


def test_a_value_too_large_for_float32_is_refused() -> None:
    given = weights() | {"neck.b.bias": torch.full((4,), 1e300, dtype=torch.float64)}
    with pytest.raises(CheckpointError, match="too large for float32"):
        fit(given, EXPECTED, NAME)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.complex64, torch.bool]
)
def test_dtypes_without_a_faithful_float32_are_refused_by_name(dtype: torch.dtype) -> None:
    given = weights() | {"neck.b.bias": torch.ones(4).to(dtype)}
    with pytest.raises(CheckpointError, match=rf"neck\.b\.bias \(file {dtype}, model"):
        fit(given, EXPECTED, NAME)


def test_other_dtypes_are_cast_and_counted() -> None:
    given = weights() | {
        "neck.b.bias": torch.ones(4, dtype=torch.float64),
        "backbone.bn.num_batches_tracked": torch.tensor(7, dtype=torch.int32),
    }
    assert fit(given, EXPECTED, NAME).cast == {"float64": 1, "int32": 1}


def test_tensors_without_values_are_refused() -> None:
    given = weights() | {"neck.b.bias": torch.empty(4, device="meta")}
    with pytest.raises(CheckpointError, match=r"without values \(meta device\)"):
        fit(given, EXPECTED, NAME)


@pytest.mark.parametrize("legacy", [False, True])
def test_names_that_share_memory_become_separate(legacy: bool, tmp_path: Path) -> None:
    flat = torch.arange(8.0)
    shared = {**weights(), "backbone.a.weight": flat[:6].view(2, 3), "neck.b.bias": flat[4:]}
    found = through("legacy" if legacy else "zip", shared, tmp_path)
    fitted = fit(found, EXPECTED, NAME).tensors
    fitted["neck.b.bias"].zero_()
    assert torch.equal(fitted["backbone.a.weight"], flat[:6].view(2, 3))
    safetensors.torch.save_file(fitted, tmp_path / "out")
    apart = {"x": flat[:4], "y": flat[4:]}
    assert separate(apart)["y"].data_ptr() == apart["y"].data_ptr()  # nothing to copy
