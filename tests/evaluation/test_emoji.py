"""The detector in the package, on the data in the package: a really trained network."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from forked import run
from helpers import left_behind

import vitadapter_zoo
from vitadapter_zoo import DatasetError, get_row
from vitadapter_zoo.catalog import PACKAGE
from vitadapter_zoo.evaluation.dataset import row_dataset

ROW = get_row("adapter-n-emoji")
WEIGHTS = PACKAGE / "data" / "emoji" / "adapter-n-emoji.safetensors"


def test_it_loads_from_the_package_offline_and_writes_no_cache(zoo_home: Path) -> None:
    model = vitadapter_zoo.load(ROW.name, offline=True)
    assert not zoo_home.exists() or left_behind(zoo_home) == []
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert sum(value.numel() for value in model.parameters()) <= 3_000_000
    assert WEIGHTS.stat().st_size <= 6_000_000
    stored = safetensors.torch.load_file(WEIGHTS)
    assert {value.dtype for value in stored.values()} == {torch.float16, torch.int64}
    for name, value in model.state_dict().items():
        assert torch.equal(value, stored[name].to(value.dtype))


def test_its_provenance_is_of_these_weights() -> None:
    from vitadapter_zoo.weights import atomic

    found = json.loads(WEIGHTS.with_suffix(".json").read_text())
    assert found["weights_sha256"] == atomic.sha256(WEIGHTS)
    assert found["validation_sha256"] == row_dataset(ROW).sha256
    assert (round(found["box_ap"], 1), round(found["mask_ap"], 1)) == (ROW.box_ap, ROW.mask_ap)
    assert {"seed", "versions", "data", "log", "command", "device"} <= set(found)


def test_it_finds_what_a_person_sees() -> None:
    model = vitadapter_zoo.load(ROW.name)
    image = next(image for image in row_dataset(ROW).images if len(image.category_ids) >= 3)
    names = dict(row_dataset(ROW).categories)
    found = model.predict(image.path)[0].filter(0.5)
    assert {names[key] for key in image.category_ids} & set(found.class_names)


@pytest.mark.parametrize(
    ("name", "factor", "limit"),
    [
        ("roi_head.bbox_head.fc_cls.weight", -1.0, 50),
        pytest.param("neck.fpn_convs.0.conv.weight", 0.5, None, marks=pytest.mark.slow),
    ],
)
def test_a_damaged_tensor_is_refuted(
    name: str, factor: float, limit: int | None, tmp_path: Path
) -> None:
    """Great damage by a part of the images, lesser damage by all of them."""
    tensors = safetensors.torch.load_file(WEIGHTS)
    tensors[name] = tensors[name] * factor
    damaged = tmp_path / WEIGHTS.name
    safetensors.torch.save_file(tensors, damaged, {"format": "pt"})
    found = vitadapter_zoo.verify(ROW.name, checkpoint=damaged, run=tmp_path / "run", limit=limit)
    assert found.verdict == "refuted"


@pytest.mark.slow
def test_bfloat16_compilation_and_workers_keep_its_ap(tmp_path: Path) -> None:
    compiled = vitadapter_zoo.load(ROW.name)
    compiled.compile()
    found = {
        "bfloat16": vitadapter_zoo.verify(
            ROW.name, dtype=torch.bfloat16, run=tmp_path / "bfloat16"
        ),
        "compiled": vitadapter_zoo.verify(compiled, row_dataset(ROW), run=tmp_path / "compiled"),
        "workers": vitadapter_zoo.verify(ROW.name, workers=2, run=tmp_path / "workers"),
    }
    allowed = {"bfloat16": 0.5, "compiled": 0.05, "workers": 0.05}
    for name, verification in found.items():
        box, mask = (100 * scores.figures["AP"] for scores in (verification.box, verification.mask))
        print(f"{name}: box AP {box:.2f}, mask AP {mask:.2f}")
        # 0.05 more, because the published figures are rounded.
        assert abs(box - ROW.box_ap) <= allowed[name] + 0.05, name
        assert abs(mask - ROW.mask_ap) <= allowed[name] + 0.05, name


def test_other_data_are_not_compared_with_the_row_s_figures(tmp_path: Path) -> None:
    data = row_dataset(ROW)
    assert data.is_measured(ROW)
    assert not data.is_measured(get_row("adapter-t-deit-3x"))
    copy = tmp_path / "annotations.json"
    shutil.copy(data.annotations, copy)
    assert replace(data, annotations=copy).is_measured(ROW)
    assert not replace(data, sha256="0" * 64).is_measured(ROW)


def test_published_rows_still_need_coco() -> None:
    with pytest.raises(DatasetError, match="COCO val2017, which is not in this package"):
        vitadapter_zoo.verify("adapter-t-deit-3x")
    done = run("verify", "adapter-t-deit-3x")
    assert done.returncode == 2
    assert "give either --coco DIR or --annotations FILE" in done.stderr
