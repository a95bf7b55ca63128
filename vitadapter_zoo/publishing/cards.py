"""Model cards in the Hub's form, from the catalog."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from vitadapter_zoo.catalog import PUBLISHED, ROWS, UNKNOWN_LICENSE, Row
from vitadapter_zoo.settings import expanded
from vitadapter_zoo.text import shown
from vitadapter_zoo.timm_detector import TimmDetector
from vitadapter_zoo.weights import atomic

DATASET = "COCO val2017"
EMOJI = "emoji scenes of vitadapter-zoo"
SOURCE = "https://github.com/czczup/ViT-Adapter/tree/main/detection"
# Pretrained weights that the Hub has too; the others are named by their address in the text.
BASE_MODELS = {
    "DeiT-T": "facebook/deit-tiny-patch16-224",
    "DeiT-S": "facebook/deit-small-patch16-224",
    "DeiT-B": "facebook/deit-base-patch16-224",
    "AugReg-L": "timm/vit_large_patch16_384.augreg_in21k_ft_in1k",
    "DINOv2-S": "facebook/dinov2-small",
    "DINOv2-B": "facebook/dinov2-base",
    "DINOv2-L": "facebook/dinov2-large",
}
# Pictures that the Hub's page offers to try a detector of everyday objects on.
SAMPLES = "https://huggingface.co/datasets/mishig/sample_images/resolve/main"
WIDGET = [
    {"src": f"{SAMPLES}/savanna.jpg", "example_title": "Savanna"},
    {"src": f"{SAMPLES}/football-match.jpg", "example_title": "Football match"},
    {"src": f"{SAMPLES}/airport.jpg", "example_title": "Airport"},
]
LIBRARY = "vitadapter-zoo"
TAGS = ["object-detection", "instance-segmentation", "mask-rcnn", "vit-adapter"]
# Names that the Hub knows as licences; others are named beside `license: other`.
COMMON_LICENSES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0",
                   "cc-by-nc-4.0", "cc-by-nc-sa-4.0"}  # fmt: skip
DINOV3_LICENSE = "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"
USE = """```python
import vitadapter_zoo

model = vitadapter_zoo.load("user/repo")  # this repository's name, or the path of this folder
detections = model.predict("photo.jpg")[0].filter(0.5)
```
"""
CITATION = """@inproceedings{chen2023vitadapter,
  title={Vision Transformer Adapter for Dense Predictions},
  author={Chen, Zhe and Duan, Yuchen and Wang, Wenhai and He, Junjun and Lu, Tong and Dai, Jifeng
          and Qiao, Yu},
  booktitle={International Conference on Learning Representations},
  year={2023}
}"""


def card(row: Row) -> ModelCard:
    """Build the card of a row: metadata with its published results, and the text."""
    text = _made_here(row) if row.made_here else _text(row)
    return ModelCard(f"---\n{metadata(row).to_yaml()}\n---\n\n{text}")


def metadata(row: Row) -> ModelCardData:
    """Build the card's metadata, with one result for boxes and one for masks."""
    results = [
        EvalResult(
            task_type=task,
            dataset_type="emoji" if row.made_here else "coco",
            dataset_name=EMOJI if row.made_here else DATASET,
            dataset_split="val" if row.made_here else "val2017",
            metric_type=kind,
            metric_name=name,
            metric_value=value,
            source_name=None if row.made_here else "ViT-Adapter, detection results",
            source_url=None if row.made_here else _results_of(row),
        )
        for task, kind, name, value in (
            ("object-detection", "box_ap", "box AP", row.box_ap),
            ("instance-segmentation", "mask_ap", "mask AP", row.mask_ap),
        )
    ]
    return ModelCardData(
        license=row.license.lower(),
        library_name=LIBRARY,
        pipeline_tag="image-segmentation",
        tags=TAGS if row.made_here else [*TAGS, "coco"],
        datasets=None if row.made_here else ["detection-datasets/coco"],
        base_model=BASE_MODELS.get(row.pretraining_name),
        model_name=row.name,
        eval_results=results,
        widget=None if row.made_here else WIDGET,
    )


def _configurations(row: Row) -> str:
    """Return the URL of the folder with the row's original configuration file."""
    return f"{SOURCE}/configs/mask_rcnn" + ("/dinov2" if row.from_dinov2 else "")


def _results_of(row: Row) -> str:
    """Return the URL of the page that publishes the row's figures."""
    return _configurations(row) if row.from_dinov2 else SOURCE


def saved_card(row: Row, categories: Sequence[str]) -> ModelCard:
    """Build the card of a detector that a user saved; it has no results."""
    names = ", ".join(markdown(name) for name in categories[:10])
    names += ", ..." if len(categories) > 10 else ""
    classes = f"{len(categories)} classes: {names}"
    if row.network is not None:
        return _around_timm(row, row.network, classes)
    data = ModelCardData(
        license=row.license.lower(),
        library_name=LIBRARY,
        pipeline_tag="image-segmentation",
        tags=TAGS,
        base_model=BASE_MODELS.get(row.pretraining_name),
    )
    return ModelCard(f"""---
{data.to_yaml()}
---

# {row.backbone} with Mask R-CNN

A detector with the network of `{row.name}`, saved by vitadapter-zoo. This card was generated and
does not know whether the weights were trained further: add the training data, the recipe and the
results. The published results of `{row.name}` are at <{_results_of(row)}>.

{classes}

{USE}""")


def _around_timm(row: Row, network: TimmDetector, classes: str) -> ModelCard:
    """The card of a saved detector around a timm model."""
    data = ModelCardData(
        **_license(network.license),
        library_name=LIBRARY,
        pipeline_tag="image-segmentation",
        tags=[*TAGS, "timm"],
        base_model=network.weights if (network.weights or "").startswith("timm/") else None,
    )
    return ModelCard(f"""---
{data.to_yaml()}
---

# {network.described} with Mask R-CNN

A detector saved by vitadapter-zoo. This card was generated: add the training data, the recipe and
the results.

{_origin(network)}

{classes}

Images are resized to fit {row.input_size[0]} x {row.input_size[1]} and normalised as for the
trunk's pretraining; `model.predict` does that.

{USE}""")


def _license(name: str | None) -> dict[str, Any]:
    """The card's licence, which is that of the trunk's weights."""
    if name is None:
        return {"license": UNKNOWN_LICENSE}
    if name.lower() in COMMON_LICENSES:
        return {"license": name.lower()}
    link = {"license_link": DINOV3_LICENSE} if name == "dinov3-license" else {}
    return {"license": "other", "license_name": name, **link}


def _origin(network: TimmDetector) -> str:
    """What is known of the trunk's weights and their licence."""
    if network.weights is None:
        return (
            "The trunk was trained from scratch, so that no licence of other weights applies. The "
            "licence of these weights is not known to this card."
        )
    state = "frozen" if network.frozen else "trained further"
    if network.license is None:
        licence = (
            "Their licence is unknown: neither timm nor the Hub names one. Find it out before you "
            "publish this detector, which contains or needs them."
        )
    else:
        licence = (
            f"Their licence is `{markdown(network.license)}`, which holds for this detector too, "
            "because it contains or needs them."
        )
    stored = (
        "They are in this folder."
        if network.stored
        else "They are not in this folder: `load` reads them from that file."
    )
    return (
        f"The trunk's weights are those of `{markdown(network.weights)}` (sha256 "
        f"`{network.sha256}`), {state}. {stored} {licence}"
    )


def markdown(text: str, limit: int = 60) -> str:
    """Escape untrusted text for Markdown: one line, shortened, without markup or HTML."""
    return re.sub(r"([\\`*_{}\[\]()<>#|!&~])", r"\\\1", shown(text, limit).replace("\\", "/"))


def write(row: Row, folder: Path) -> Path:
    """Write the row's card as ``<folder>/<name>.md``; return its path.

    Raises:
        ZooError: the folder cannot be written to.
    """
    path = expanded(folder) / f"{row.name}.md"
    atomic.write_text(path, str(card(row)).rstrip() + "\n")
    return path


def _text(row: Row) -> str:
    neck = "an FPN" if row.fpn else "a channel mapper instead of an FPN"
    schedule = (
        "12 epochs (1x) at 1333 x 800"
        if row.schedule == "1x"
        else "36 epochs (3x), multi-scale: shortest side 480 to 800, longest at most 1333"
    )
    notes = f"\n{row.notes}\n" if row.notes else ""
    log = f"\nTraining log: <{row.log_url}>." if row.log_url else ""
    mean, std = (", ".join(f"{value:g}" for value in triple) for triple in (row.mean, row.std))
    return f"""# {row.name}

{row.backbone} with Mask R-CNN and {neck}, trained on COCO by the authors of
[ViT-Adapter]({row.paper}), starting from [{row.pretraining_name}]({row.pretraining_url}). It finds
objects of COCO's 80 classes with their boxes and masks. About {row.parameters}M parameters, as
published.
{notes}
## Use

```python
import vitadapter_zoo

model = vitadapter_zoo.load("{row.name}")
detections = model.predict("photo.jpg")[0].filter(0.5)
print(detections.class_names, detections.boxes)  # xyxy, image pixels
```

```sh
vitadapter-zoo predict photo.jpg --model {row.name}
```

Images are resized to fit {row.input_size[0]} x {row.input_size[1]} and normalised with mean
({mean}) and standard deviation ({std}) of RGB, 0 to 255; `model.predict` does that.

`library_name: {LIBRARY}` in the metadata names the package that reads the file. The Hub's own
inference does not know it, so the example pictures of the metadata serve apps that run the package.

## Results

COCO val2017, as published by the authors, not measured again here:

{_table(row)}

## Training

By the authors, with [{row.config}]({_configurations(row)}): COCO train2017, {schedule}, AdamW.
{log}
## Intended use and limits

For research and as a starting point for fine-tuning. The classes are COCO's: everyday objects in
ordinary photographs. Other pictures (medical, aerial, drawings), small or crowded objects and
unusual views are found less well, COCO's bias in places and people is inherited, and scores are not
calibrated probabilities. Not for decisions about people or for safety without tests of your own.

The published file: <{row.checkpoint_url}>, {row.license}.

## Citation

```bibtex
{CITATION}
```
"""


def _made_here(row: Row) -> str:
    mean, std = (", ".join(f"{value:g}" for value in triple) for triple in (row.mean, row.std))
    return f"""# {row.name}

A small {row.backbone} with Mask R-CNN and an FPN, trained from nothing by vitadapter-zoo itself for
demonstrations and tests. It finds drawings (Noto Color Emoji) of {len(row.classes)} of COCO's
classes with their boxes and masks: {", ".join(row.classes)}. It has the parts of the published
networks, narrower and shallower: windowed and global attention, injectors, extractors, FPN,
proposals, boxes and masks. About {row.parameters}M parameters, stored as float16.

## Use

The weights are in the package; nothing is downloaded.

```python
import vitadapter_zoo

model = vitadapter_zoo.load("{row.name}")
detections = model.predict("picture.jpg")[0].filter(0.5)
print(detections.class_names, detections.boxes)  # xyxy, image pixels
```

```sh
vitadapter-zoo verify {row.name}
```

Images are resized to fit {row.input_size[0]} x {row.input_size[1]} and normalised with mean
({mean}) and standard deviation ({std}) of RGB, 0 to 255; `model.predict` does that.

## Results

Box AP {row.box_ap:.1f} and mask AP {row.mask_ap:.1f} (COCO's, IoU 0.50:0.05:0.95) on the 200
validation images in the package, measured with the stored weights. These figures say nothing about
photographs and cannot be compared with figures on COCO.

## Data

`scripts/make_emoji_coco.py` renders the images: glyphs in many sizes, turned, mirrored, recoloured,
partly hidden, on photographs and on textures, with objects of no class among them. The masks are
exact. The validation images' photographs and objects of no class are not among the training's; the
glyphs are the same.

## Training

Four runs of `scripts/train_demo.py`, each from the weights of the one before: 6 minutes from
nothing on a GPU, then 40, 95 and 98 minutes on one CPU core, about 55,000 images in all. The first
two were on harder images: more hidden, smaller and more recoloured objects. Commands, seeds,
versions, hashes of the data and the training logs are in `{row.name}.json` beside the weights. More
training would help: the last run raised box AP by 4.7 and mask AP by 3.9 points. No single run from
nothing has given these weights.

## Licences

Weights and annotations: {row.license}. The glyphs in the images: SIL Open Font License 1.1. The
photographs in the background: see `LICENSE.md` beside the images.

## Citation

```bibtex
{CITATION}
```
"""


def _table(highlighted: Row) -> str:
    lines = [
        "| model | pretraining | schedule | FPN | box AP | mask AP |",
        "|---|---|---|---|---|---|",
    ]
    for row in PUBLISHED if highlighted.from_dinov2 else ROWS:
        mark = "**" if row == highlighted else ""
        cells = (
            row.name,
            row.pretraining_name,
            row.schedule,
            "yes" if row.fpn else "no",
            f"{row.box_ap:.1f}",
            f"{row.mask_ap:.1f}",
        )
        lines.append("| " + " | ".join(f"{mark}{cell}{mark}" for cell in cells) + " |")
    return "\n".join(lines)
