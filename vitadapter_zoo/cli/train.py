"""``train``: train a detector on your own data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import click

from vitadapter_zoo.cli.models import model_names


@click.command(
    epilog="""\b
Examples:
  vitadapter-zoo train adapter-t-deit-3x --data my-data --out run
  vitadapter-zoo train adapter-s-deit-3x --data my-data --out run --epochs 20 --ema 0.999
  vitadapter-zoo train adapter-t-deit-3x --data coco --out run --from pretraining --batch-size 16
  vitadapter-zoo train adapter-t-deit-3x --data my-data --out run --resume
  accelerate launch --num-processes 8 -m vitadapter_zoo train adapter-b-deit-3x --data DIR --out R
""",
)
@click.argument("name", shell_complete=model_names)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Folder: train/_annotations.coco.json and valid/ (Roboflow's COCO export), "
    "annotations/instances_*.json (COCO), or data.yaml (YOLO segmentation).",
)
@click.option(
    "--train",
    "train_files",
    type=click.Path(path_type=Path),
    nargs=2,
    metavar="FILE DIR",
    help="Annotation file and image folder to train on, instead of --data.",
)
@click.option(
    "--val",
    "valid_files",
    type=click.Path(path_type=Path),
    nargs=2,
    metavar="FILE DIR",
    help="Annotation file and image folder to evaluate on, with --train.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder of the run, with last/ and best/ (detectors for --model), log.jsonl and state.pt.",
)
@click.option(
    "--from",
    "start",
    default="published",
    show_default=True,
    metavar="START",
    help="Initial weights: published (those of NAME), pretraining (the trunk only, as in the "
    "paper), scratch, or another load name, folder or checkpoint file.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Continue the run in --out; the result is the same as without the interruption.",
)
@click.option(
    "--epochs", type=click.IntRange(1), help="Passes over the images. [paper] 12 (1x) or 36 (3x)."
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="[paper] Images per device and forward pass; the paper used 8 devices.",
)
@click.option(
    "--accumulate",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Forward passes per optimizer step.",
)
@click.option(
    "--lr",
    type=click.FloatRange(0, min_open=True),
    help="Learning rate. [paper] 1e-4 (3x) or 2e-4 (1x) for 16 images per step, scaled linearly.",
)
@click.option(
    "--schedule",
    type=click.Choice(["step", "cosine"]),
    help="Learning rate over time. [paper] step: divided by 10 after 3/4 (1x: 2/3) and 11/12 of "
    "the epochs.",
)
@click.option("--weight-decay", type=click.FloatRange(0), help="[paper] 0.05 (3x), 0.01 (1x).")
@click.option(
    "--layer-decay",
    type=click.FloatRange(0, 1, min_open=True),
    help="[paper] 0.8 (AugReg-L, DINOv2-L), 0.7 (DINOv2-S, -B), 0.65 (Uni-Perceiver-B), none for "
    "the others.",
)
@click.option(
    "--clip", type=click.FloatRange(0, min_open=True), help="Clip gradients to this norm."
)
@click.option(
    "--augment",
    type=click.Choice(["multi-scale", "flip", "none"]),
    help="[paper] multi-scale with crops (3x), flip (1x).",
)
@click.option(
    "--ema",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Decay of a moving average of the weights, 0.999 for instance.",
)
@click.option(
    "--input-size",
    type=click.IntRange(32),
    nargs=2,
    metavar="LONG SHORT",
    help="[paper] Largest sides of the resized images: 1333 800.",
)
@click.option("--keep-empty", is_flag=True, help="Also train on images without objects.")
@click.option(
    "--freeze",
    multiple=True,
    metavar="PREFIX",
    help="Do not train parameters whose names start with PREFIX, for example backbone.",
)
@click.option(
    "--checkpoint-blocks",
    is_flag=True,
    help="Use less memory and more time: recompute the blocks' activations.",
)
@click.option(
    "--early-stop",
    type=click.IntRange(1),
    metavar="N",
    help="Stop after N evaluations without a better mask AP.",
)
@click.option(
    "--eval-every",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Epochs between evaluations.",
)
@click.option(
    "--max-minutes",
    type=click.FloatRange(0, min_open=True),
    metavar="M",
    help="Stop after M minutes; the schedule is shortened to end then.",
)
@click.option(
    "--precision",
    type=click.Choice(["no", "bf16"]),
    default="no",
    show_default=True,
    help="bf16: compute in bfloat16 where it is safe.",
)
@click.option("--device", help="cpu, cuda, cuda:1, ...  [default: the best available]")
@click.option(
    "--workers",
    type=click.IntRange(0),
    metavar="N",
    help="Processes that prepare images.  [default: the number of cores minus one]",
)
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard files.")
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Seed of all random numbers.",
)
@click.option("--offline", is_flag=True, help="Never use the network.")
@click.option("--quiet", is_flag=True, help="Show nothing but errors.")
def train(
    name: str,
    data: Path | None,
    train_files: tuple[Path, Path] | None,
    valid_files: tuple[Path, Path] | None,
    out: Path,
    start: str,
    resume: bool,
    epochs: int | None,
    batch_size: int,
    accumulate: int,
    lr: float | None,
    schedule: str | None,
    weight_decay: float | None,
    layer_decay: float | None,
    clip: float | None,
    augment: str | None,
    ema: float | None,
    input_size: tuple[int, int] | None,
    keep_empty: bool,
    freeze: tuple[str, ...],
    checkpoint_blocks: bool,
    early_stop: int | None,
    eval_every: int,
    max_minutes: float | None,
    precision: str,
    device: str | None,
    workers: int | None,
    tensorboard: bool,
    seed: int,
    offline: bool,
    quiet: bool,
) -> None:
    """Train NAME on your own data, or as the paper did.

    Options marked [paper] default to the recipe with which NAME was published. The other options
    are not in the paper and are off by default. Class names come from the annotations.
    """
    if (data is None) == (train_files is None):
        raise click.UsageError("give --data DIR, or --train FILE DIR (and --val FILE DIR)")
    if data is not None and valid_files is not None:
        raise click.UsageError("--val belongs to --train; --data has its own validation images")
    from vitadapter_zoo.cli.devices import usable_device
    from vitadapter_zoo.training.run import train as run

    if device is not None:
        usable_device(device)
    result = run(
        name,
        data,
        out,
        train_files=train_files,
        valid_files=valid_files,
        start=start,
        resume=resume,
        epochs=epochs,
        batch_size=batch_size,
        accumulate=accumulate,
        lr=lr,
        schedule=cast("Any", schedule),
        weight_decay=weight_decay,
        layer_decay=layer_decay,
        clip=clip,
        augment=cast("Any", augment),
        ema=ema,
        input_size=input_size,
        keep_empty=keep_empty,
        freeze=freeze,
        checkpoint_blocks=checkpoint_blocks,
        early_stop=early_stop,
        eval_every=eval_every,
        max_minutes=max_minutes,
        precision=cast("Literal['no', 'bf16']", precision),
        device=device,
        workers=workers,
        tensorboard=tensorboard,
        seed=seed,
        offline=offline or None,
        progress=not quiet,
    )
    if not result.is_main_process:
        return
    if result.figures:
        click.echo(
            f"box AP {result.figures['box_ap']:.1f}, mask AP {result.figures['mask_ap']:.1f} "
            f"(best {result.best_mask_ap:.1f})"
        )
    click.echo(f"{result.best}: vitadapter-zoo predict IMAGE --model {result.best}")
