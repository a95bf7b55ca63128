"""Detectors with other classes: from COCO's weights, from mmdet's files, and back."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import standins
import torch
from forked import failure, run
from torch import Tensor

import vitadapter_zoo
from vitadapter_zoo import CheckpointError, ZooError
from vitadapter_zoo.catalog import COCO_CLASSES
from vitadapter_zoo.weights.heads import CLASS_ROWS, for_classes

NAME = "adapter-t-deit-3x"
OWN = ("spark plug", "cat", "person")


@pytest.fixture(scope="module")
def own_weights() -> dict[str, Tensor]:
    """A detector with three classes, as training saves it."""
    weights = for_classes(standins.state_dict(NAME), COCO_CLASSES, OWN)
    return {name: value.contiguous() for name, value in weights.items()}


def rows(weights: dict[str, Tensor], head: str, label: int) -> Tensor:
    count = CLASS_ROWS[head][0]
    return weights[f"{head}.weight"][label * count : (label + 1) * count]


def test_heads_keep_the_classes_of_the_same_name() -> None:
    state = standins.state_dict(NAME)
    new = for_classes(state, COCO_CLASSES, OWN)
    for head, (count, background, _) in CLASS_ROWS.items():
        assert len(new[f"{head}.weight"]) == len(new[f"{head}.bias"]) == 3 * count + background
        for label, name in enumerate(OWN):
            if name in COCO_CLASSES:
                old = rows(state, head, COCO_CLASSES.index(name))
                assert torch.equal(rows(new, head, label), old)
        assert 0 < rows(new, head, 0).std() < 1
        if background:
            assert torch.equal(new[f"{head}.weight"][-1], state[f"{head}.weight"][-1])
            assert new[f"{head}.bias"][-1] == state[f"{head}.bias"][-1]
    unchanged = [name for name in state if not name.startswith(tuple(CLASS_ROWS))]
    assert all(torch.equal(new[name], state[name]) for name in unchanged)


def test_cocos_weights_with_other_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "coco.safetensors"
    safetensors.torch.save_file(standins.state_dict(NAME), path)
    with caplog.at_level(logging.WARNING):
        model = vitadapter_zoo.load(NAME, checkpoint=path, classes=list(OWN))
    assert model.categories == OWN
    assert "heads kept for cat, person; fresh heads for spark plug" in caplog.text
    assert not any(value.is_meta for value in model.state_dict().values())
    assert model.predict(standins.PHOTO)[0].categories == OWN
    fresh = vitadapter_zoo.load(NAME, pretrained=False, classes=OWN)
    assert (fresh.categories, fresh.roi_head.bbox_head.fc_cls.out_features) == (OWN, 4)


def test_mmdets_own_checkpoints_there_and_back(
    own_weights: dict[str, Tensor], tmp_path: Path
) -> None:
    named, bare = tmp_path / "named.pth", tmp_path / "bare.pth"
    torch.save({"state_dict": own_weights, "meta": {"CLASSES": OWN}}, named)
    torch.save({"state_dict": own_weights, "meta": {}}, bare)
    assert vitadapter_zoo.load(NAME, checkpoint=named).categories == OWN
    with pytest.raises(CheckpointError, match=r"has 3 classes and does not hold their names"):
        vitadapter_zoo.load(NAME, checkpoint=bare)
    given = vitadapter_zoo.load(NAME, checkpoint=bare, classes=["a", "b", "c"])
    assert given.categories == ("a", "b", "c")
    there, back = tmp_path / "a.safetensors", tmp_path / "b.pth"
    done = run("convert", str(bare), "--model", NAME, "--out", str(there), "--classes",
               "spark plug, cat, person")  # fmt: skip
    assert (done.returncode, "classes: 3" in done.stdout) == (0, True), done
    assert vitadapter_zoo.load(NAME, checkpoint=there).categories == OWN
    again = run("convert", str(there), "--model", NAME, "--format", "mmdet", "--out", str(back))
    assert again.returncode == 0, again
    returned: Any = torch.load(back, weights_only=True)
    assert returned["meta"]["CLASSES"] == OWN
    assert all(torch.equal(returned["state_dict"][key], own_weights[key]) for key in own_weights)
    assert "has 3 classes and 2 names were given" in failure(
        "convert", str(bare), "--model", NAME, "--classes", "a,b", "--out", str(tmp_path / "c.pth")
    )


def test_a_saved_folder_keeps_its_classes_in_every_command(
    own_weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "own.safetensors"
    safetensors.torch.save_file(own_weights, path, {"classes": json.dumps(OWN)})
    folder = vitadapter_zoo.save_pretrained(
        vitadapter_zoo.load(NAME, checkpoint=path), tmp_path / "mine"
    )
    assert vitadapter_zoo.load(folder).categories == OWN
    assert vitadapter_zoo.load(folder, classes=["cat"]).categories == ("cat",)
    out = tmp_path / "mine.pth"
    done = run("convert", str(folder), "--format", "mmdet", "--out", str(out))
    assert done.returncode == 0, done
    assert torch.load(out, weights_only=True)["meta"]["CLASSES"] == OWN
    assert "'num_classes': 3" in run("config", str(folder)).stdout
    assert "3 classes: spark plug, cat, person" in run("card", str(folder)).stdout


@pytest.mark.parametrize("classes", [[], "cat", ["a", "a"], ["a", ""], ["a", 3]])
def test_classes_that_are_no_distinct_names_are_refused(classes: Any) -> None:
    with pytest.raises(ZooError, match="classes"):
        vitadapter_zoo.load(NAME, classes=classes)
