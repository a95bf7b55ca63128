"""Measure detectors of transformers before and after `vitadapter_zoo.ops.accelerate`.

    python benchmarks/foundation.py [FAMILY ...] [--runs 5] [--size 480 640] [--device cuda]

Models have the published sizes and random weights, at batch size 1. Every round runs the model as
it is, accelerates it, runs it again and restores it, so that other load on the machine affects
both. The ratio is the median over the rounds. ``differs`` is the largest difference of one output,
relative to its largest value. OneFormer's comes after masks that are cut at a threshold, which a
rounding error may pass.

``accelerate`` leaves some families as they are. To show why, their modules are given the operator
by hand; these rows say so. ``MSDeformAttn`` is one attention of DINOv3's adapter of size S, not a
whole model: tokens at strides 8, 16 and 32 attend to the map at stride 16.

    python benchmarks/foundation.py --dinov3 S [B] [--runs 5] [--size 480 640]

measures DINOv3's adapter instead, see `benchmarks/dinov3.py`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / "support")]
import authors  # noqa: E402

from vitadapter_zoo.ops import accelerate, forwards, restore  # noqa: E402

Size = tuple[int, int]
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """A model and its input.

    Attributes:
        build: the model for an image of (height, width).
        inputs: the arguments of its call for that image.
        output: the name of the compared output.
        size: (height, width) where the model takes one size only.
    """

    build: Callable[[Size], nn.Module]
    inputs: Callable[[Size], Inputs]
    output: str
    size: Size | None = None


def image(size: Size) -> Inputs:
    """Create a random image ``[1, 3, *size]``."""
    return {"pixel_values": torch.randn(1, 3, *size)}


def with_words(size: Size) -> Inputs:
    """Create an image and the tokens of a caption."""
    words = torch.tensor([[101, 4937, 1012, 3899, 1012, 102]])
    return {**image(size), "input_ids": words, "attention_mask": torch.ones_like(words)}


def with_classes(size: Size) -> Inputs:
    """Create an image and the tokens of OmDet-Turbo's classes and task."""
    words, tasks = torch.randint(5, 1000, (2, 6)), torch.randint(5, 1000, (1, 8))
    return {
        **image(size),
        "classes_input_ids": words,
        "classes_attention_mask": torch.ones_like(words),
        "tasks_input_ids": tasks,
        "tasks_attention_mask": torch.ones_like(tasks),
        "classes_structure": torch.tensor([2]),
    }


def with_task(size: Size) -> Inputs:
    """Create an image and OneFormer's task tokens."""
    return {**image(size), "task_inputs": torch.randint(1, 1000, (1, 77)).float()}


def _resnet50() -> Any:
    return transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"])


def _swin_t() -> Any:
    names = ["stage1", "stage2", "stage3", "stage4"]
    return transformers.SwinConfig(window_size=7, drop_path_rate=0.0, out_features=names)


def _deformable_detr(_size: Size) -> nn.Module:
    config = transformers.DeformableDetrConfig(backbone_config=_resnet50())
    return transformers.DeformableDetrForObjectDetection(config)


def _mask2former(_size: Size) -> nn.Module:
    config = transformers.Mask2FormerConfig(backbone_config=_swin_t())
    return transformers.Mask2FormerForUniversalSegmentation(config)


def _oneformer(_size: Size) -> nn.Module:
    config = transformers.OneFormerConfig(backbone_config=_swin_t())
    return transformers.OneFormerForUniversalSegmentation(config)


def _lw_detr(size: Size) -> nn.Module:
    trunk = transformers.LwDetrViTConfig(
        hidden_size=192,
        num_hidden_layers=10,
        num_attention_heads=12,
        image_size=size[0],
        window_block_indices=[0, 1, 3, 6, 7, 9],
        out_indices=[2, 4, 5, 9],
    )
    config = transformers.LwDetrConfig(backbone_config=trunk, projector_scale_factors=[1.0])
    return transformers.LwDetrForObjectDetection(config)


def _rf_detr(size: Size) -> nn.Module:
    trunk = transformers.RfDetrDinov2Config(
        hidden_size=384,
        num_attention_heads=6,
        image_size=size[0],
        out_features=["stage2", "stage5", "stage8", "stage11"],
    )
    return transformers.RfDetrForObjectDetection(transformers.RfDetrConfig(backbone_config=trunk))


def _default(name: str, **options: Any) -> Callable[[Size], nn.Module]:
    def build(_size: Size) -> nn.Module:
        config = getattr(transformers, f"{name}Config")(**options)
        return getattr(transformers, f"{name}ForObjectDetection")(config)

    return build


class Extractor(nn.Module):
    """The attention of an extractor in DINOv3's adapter of size S, alone."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = authors.MSDeformAttn(384, n_levels=1, n_heads=16, n_points=4, ratio=0.5)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Attend from random queries at strides 8, 16 and 32 to a random map at stride 16."""
        height, width = pixel_values.shape[2:]
        count = sum((height // stride) * (width // stride) for stride in (8, 16, 32))
        shapes = torch.tensor([[height // 16, width // 16]], device=pixel_values.device)
        numbers = torch.Generator().manual_seed(0)
        query = torch.randn(1, count, 384, generator=numbers).to(pixel_values.device)
        pixels = query[:, : (height // 16) * (width // 16)]
        points = torch.rand(1, count, 1, 2, generator=numbers).to(pixel_values.device)
        return {"attended": self.attn(query, points, pixels, shapes, shapes.new_zeros(1))}


FAMILIES = {
    "Deformable DETR R50": Family(_deformable_detr, image, "encoder_last_hidden_state"),
    "GroundingDINO Swin-T": Family(
        _default("GroundingDino"), with_words, "encoder_last_hidden_state_vision"
    ),
    "MM-GroundingDINO Swin-T": Family(
        _default("MMGroundingDino"), with_words, "encoder_last_hidden_state_vision"
    ),
    "Mask2Former Swin-T": Family(_mask2former, image, "pixel_decoder_last_hidden_state"),
    "OneFormer Swin-T": Family(_oneformer, with_task, "class_queries_logits"),
    "OmDet-Turbo Swin-T": Family(
        _default("OmDetTurbo", use_pretrained_backbone=False),
        with_classes,
        "decoder_class_logits",
        (640, 640),
    ),
    "MSDeformAttn": Family(lambda _size: Extractor(), image, "attended"),
    "RT-DETR R50": Family(_default("RTDetr"), image, "last_hidden_state", (640, 640)),
    "LW-DETR tiny": Family(_lw_detr, image, "last_hidden_state", (640, 640)),
    "RF-DETR base": Family(_rf_detr, image, "last_hidden_state", (560, 560)),
    "PP-DocLayoutV3": Family(_default("PPDocLayoutV3"), image, "last_hidden_state", (800, 800)),
}


def give_by_hand(model: nn.Module) -> int:
    """Bind the operator to every inner attention of transformers; return how many there are."""
    inner = [
        module
        for module in model.modules()
        if type(module).__name__ == "MultiScaleDeformableAttention"
    ]
    for module in inner:
        module.forward = MethodType(forwards.inner, module)
    return len(inner)


def take_back(model: nn.Module) -> None:
    """Undo `give_by_hand`."""
    for module in model.modules():
        if type(module).__name__ == "MultiScaleDeformableAttention":
            vars(module).pop("forward", None)


def timed(model: nn.Module, inputs: Inputs, device: str) -> tuple[float, Any]:
    """Run the model once; return the seconds and its output."""
    start = time.perf_counter()
    output = model(**inputs)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start, output


def measure(family: Family, size: Size, runs: int, device: str) -> list[str]:
    """Return the family's row: how many were replaced, seconds, ratio and difference."""
    torch.manual_seed(0)
    size = family.size or size
    model = family.build(size).eval().to(device)
    inputs = {name: tensor.to(device) for name, tensor in family.inputs(size).items()}
    count = accelerate(model)
    restore(model)
    on, off = (accelerate, restore) if count else (give_by_hand, take_back)
    timed(model, inputs, device)
    rounds = []
    for _ in range(runs):
        before, theirs = timed(model, inputs, device)
        replaced = on(model)
        after, ours = timed(model, inputs, device)
        off(model)
        rounds.append((before, after))
    expected, got = theirs[family.output], ours[family.output]
    differs = float((got - expected).abs().max() / expected.abs().max())
    seconds = [statistics.median(times) for times in zip(*rounds, strict=True)]
    ratio = statistics.median(before / after for before, after in rounds)
    return [
        f"{size[0]} x {size[1]}",
        str(count) if count else f"0 ({replaced} by hand)",
        *(f"{value:.3f}" for value in seconds),
        f"{ratio:.2f}",
        f"{differs:.0e}",
    ]


def main() -> None:
    """Measure the families named on the command line, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="the start of a name")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--size", type=int, nargs=2, default=[480, 640], help="height and width")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dinov3", nargs="+", choices=["S", "B"], help="its adapter, by size")
    options = parser.parse_args()
    if options.dinov3:
        import dinov3

        dinov3.report(options.dinov3, tuple(options.size), options.runs, options.device)
        return
    transformers.logging.set_verbosity_error()
    names = [
        name
        for name in FAMILIES
        if not options.families or name.startswith(tuple(options.families))
    ]
    if not names:
        parser.error(f"no such family; there are {', '.join(FAMILIES)}")
    table = Table("family", "image", "replaced", "before, s", "after, s", "ratio", "differs")
    with torch.inference_mode():
        for name in names:
            size = (options.size[0], options.size[1])
            row = measure(FAMILIES[name], size, options.runs, options.device)
            print(f"{name}: {'  '.join(row)}", file=sys.stderr, flush=True)
            table.add_row(name, *row)
    where = torch.cuda.get_device_name() if options.device != "cpu" else "CPU"
    Console().print(f"{where}, {torch.get_num_threads()} threads", table, sep="\n")


if __name__ == "__main__":
    main()
