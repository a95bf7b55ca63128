"""Saved detectors and their cards, in folders and on a stand-in of the Hub."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import same_weights
from huggingface_hub import ModelCard
from huggingface_hub.utils._validators import validate_repo_id

import vitadapter_zoo
from vitadapter_zoo import CheckpointError, MaskRCNN, get_row, list_models
from vitadapter_zoo.catalog import PUBLISHED
from vitadapter_zoo.publishing.cards import card

NAME = "adapter-t-deit-3x"
CARDS = Path(__file__).parents[2] / "model_cards"


def test_a_saved_folder_is_read_back(tiny: MaskRCNN, tmp_path: Path) -> None:
    folder = vitadapter_zoo.save_pretrained(tiny, tmp_path / "mine")
    names = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert {path.name for path in folder.iterdir()} == names
    for given in (folder, str(folder)):
        back = vitadapter_zoo.load(given)
        assert same_weights(back, NAME)
        assert (back.row, back.categories) == (tiny.row, tiny.categories)
        assert not back.training
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "facebook/deit-tiny-patch16-224"
    assert card.data.eval_results is None  # nobody measured these weights
    assert "80 classes: person" in card.text


def test_shards_are_written_and_read(tiny: MaskRCNN, tmp_path: Path) -> None:
    folder = vitadapter_zoo.save_pretrained(tiny, tmp_path, max_shard_size="30MB")
    shards = list(folder.glob("model-0*.safetensors"))
    assert len(shards) > 2
    assert same_weights(vitadapter_zoo.load(folder), NAME)
    index = folder / "model.safetensors.index.json"
    assert same_weights(vitadapter_zoo.load(NAME, checkpoint=index), NAME)
    shards[0].unlink()
    with pytest.raises(CheckpointError, match=f"lacks {shards[0].name}"):
        vitadapter_zoo.load(folder)


def test_an_index_may_not_name_files_elsewhere(tiny: MaskRCNN, tmp_path: Path) -> None:
    folder = vitadapter_zoo.save_pretrained(tiny, tmp_path, max_shard_size="30MB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = "../secret.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="outside its own folder"):
        vitadapter_zoo.load(folder)


def test_bad_folders_are_errors(tiny: MaskRCNN, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        vitadapter_zoo.load(tmp_path)
    folder = vitadapter_zoo.save_pretrained(tiny, tmp_path / "mine")
    (folder / "preprocessor_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not complete: 'size'"):
        vitadapter_zoo.load(folder)
    with pytest.raises(ValueError, match="has weights of its own"):
        vitadapter_zoo.load(folder, pretrained=False)


def test_half_precision_is_kept(standin_model: Callable[[str], MaskRCNN], tmp_path: Path) -> None:
    half = standin_model(NAME).bfloat16()
    back = vitadapter_zoo.load(vitadapter_zoo.save_pretrained(half, tmp_path))
    assert {value.dtype for value in back.parameters()} == {torch.bfloat16}
    assert torch.equal(back.neck.state_dict()["fpn_convs.0.conv.weight"],
                       half.neck.state_dict()["fpn_convs.0.conv.weight"])  # fmt: skip


def test_committed_cards_match_the_generator() -> None:
    assert sorted(path.stem for path in CARDS.iterdir()) == sorted(list_models())
    for name in list_models():
        written = (CARDS / f"{name}.md").read_text(encoding="utf-8")
        assert written == str(card(get_row(name))).rstrip() + "\n"


def test_the_card_of_the_row_made_here_claims_nothing_about_coco() -> None:
    row = get_row("adapter-n-emoji")
    data = ModelCard.load(CARDS / f"{row.name}.md").data
    assert data.eval_results
    assert [result.metric_value for result in data.eval_results] == [row.box_ap, row.mask_ap]
    assert {result.dataset_type for result in data.eval_results} == {"emoji"}
    assert "coco" not in data.tags
    assert (data.datasets, data.base_model) == (None, None)
    assert getattr(data, "widget", None) is None  # photographs are not what it was trained on


@pytest.mark.parametrize("name", [row.name for row in PUBLISHED])
def test_card_metadata_holds_the_published_results(name: str) -> None:
    row, data = get_row(name), ModelCard.load(CARDS / f"{name}.md").data
    assert data.eval_results
    results = {result.task_type: result for result in data.eval_results}
    assert results["object-detection"].metric_value == row.box_ap
    assert results["instance-segmentation"].metric_value == row.mask_ap
    assert {result.dataset_type for result in results.values()} == {"coco"}
    assert all(result.source_url for result in results.values())
    for result in data.eval_results:
        assert (result.dataset_name, result.dataset_split) == ("COCO val2017", "val2017")
    assert {"object-detection", "instance-segmentation", "vit-adapter"} <= set(data.tags)
    uniperceiver = name == "adapter-b-uniperceiver-3x"  # which the Hub does not have
    assert (data.base_model is None) == uniperceiver
    for repo in [*data.datasets, *([] if uniperceiver else [data.base_model])]:
        validate_repo_id(repo)
    assert data.pipeline_tag == "image-segmentation"
    assert data.license == "apache-2.0"
    assert data.library_name == "vitadapter-zoo"
    for example in data.widget:
        assert example["src"].startswith("https://")
        assert example["example_title"]
    assert data.model_name == name
