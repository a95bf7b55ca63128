"""Train ``adapter-n-emoji`` from nothing, and put its weights into the package.

    python scripts/train_demo.py OUT                                # 3 hours on 2 cores
    python scripts/train_demo.py OUT --device cuda --batch-size 16 --lr 1.2e-3 --max-minutes 6
    python scripts/train_demo.py OUT --seed 1 --no-install          # another seed

Renders the training images (``make_emoji_coco.py``), calls ``vitadapter-zoo train``, rounds the
weights to float16, measures them on the package's 200 validation images, and writes weights and
provenance. A run that was interrupted is continued by the same command.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from emoji_scenes import FONT
from make_emoji_coco import make_split

from vitadapter_zoo import get_row, load, verify
from vitadapter_zoo.evaluation.dataset import Dataset, row_dataset
from vitadapter_zoo.weights.convert import write_safetensors
from vitadapter_zoo.weights.source import LocalFile, parse

NAME = "adapter-n-emoji"
PACKAGES = ("torch", "torchvision", "timm", "numpy", "opencv-python-headless", "pillow")
LOG_LINES = 60  # of the training log that go into the provenance


def main() -> None:
    """Render, train, measure and install."""
    options = _options()
    out: Path = options.out
    data = _render(out, options)
    _train(out, options)
    weights, provenance = _export(out, data, options)
    record = weights.with_suffix(".json")
    record.write_text(json.dumps(provenance, indent=1) + "\n")
    print(f"{weights}: box AP {provenance['box_ap']:.2f}, mask AP {provenance['mask_ap']:.2f}")
    if options.install:
        target = packaged_weights()
        target.write_bytes(weights.read_bytes())
        target.with_suffix(".json").write_bytes(record.read_bytes())
        print(
            f"installed {target}; write box_ap={provenance['box_ap']:.1f}, "
            f"mask_ap={provenance['mask_ap']:.1f} into the catalog's row {NAME}"
        )


def packaged_weights() -> Path:
    """Where the package carries the row's weights."""
    source = parse(get_row(NAME).checkpoint_url)
    if not isinstance(source, LocalFile):
        raise SystemExit(f"{NAME} is not a row with weights in the package")
    return source.path


def validation() -> Dataset:
    """The 200 validation images that the package carries."""
    return row_dataset(get_row(NAME))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"Train {NAME} from nothing.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for images, run and weights")
    parser.add_argument("--images", type=int, default=25000, help="training images to render")
    parser.add_argument("--epochs", type=int, default=3, help="passes over them")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--max-minutes", type=float, default=170.0, help="of the training")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="no", choices=("no", "bf16"))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0, help="of the weights, order and samples")
    parser.add_argument("--data-seed", type=int, default=0, help="of the training images")
    parser.add_argument(
        "--from",
        dest="start",
        default="scratch",
        help="scratch, or a weights file of this script to go on from, its provenance beside it",
    )
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf")
    parser.add_argument("--no-install", dest="install", action="store_false")
    return parser.parse_args()


def _render(out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Render the training images, unless the same ones are there; what they are."""
    record = out / "data" / "data.json"
    wanted = {
        "script": "scripts/make_emoji_coco.py",
        "images": options.images,
        "seed": options.data_seed,
    }
    if record.is_file():
        found: dict[str, Any] = json.loads(record.read_text())
        if {key: found.get(key) for key in wanted} == wanted:
            return found
        raise SystemExit(f"{record.parent} holds other training images: remove it, or change OUT")
    began = time.monotonic()
    digest = make_split(
        out / "data",
        "train",
        options.images,
        seed=options.data_seed,
        workers=options.workers,
        font=options.font,
    )
    seconds = round(time.monotonic() - began, 1)
    content = {**wanted, "train_sha256": digest, "seconds": seconds}
    record.write_text(json.dumps(content))
    print(f"rendered {options.images:,} images in {seconds:.0f} s", flush=True)
    return content


def arguments(out: Path, options: argparse.Namespace) -> list[str]:
    """The training's command line."""
    data, packaged = out / "data", packaged_weights().parent
    return [
        "train", NAME,
        "--train", str(data / "annotations" / "instances_train.json"), str(data / "train"),
        "--val", str(packaged / "annotations" / "instances_val.json"), str(packaged / "val"),
        "--out", str(out / "run"), "--from", options.start, "--keep-empty", "--resume",
        "--epochs", str(options.epochs), "--batch-size", str(options.batch_size),
        "--lr", str(options.lr), "--schedule", "cosine", "--augment", "flip", "--clip", "5",
        "--ema", str(options.ema), "--max-minutes", str(options.max_minutes),
        "--device", options.device, "--precision", options.precision,
        "--workers", str(min(options.workers, 12)), "--seed", str(options.seed),
    ]  # fmt: skip


def _train(out: Path, options: argparse.Namespace) -> None:
    command = [sys.executable, "-m", "vitadapter_zoo.cli", *arguments(out, options)]
    print("vitadapter-zoo", *command[3:], flush=True)
    done = subprocess.run(command)
    if done.returncode != 0:
        raise SystemExit(done.returncode)


def _export(
    out: Path, data: dict[str, Any], options: argparse.Namespace
) -> tuple[Path, dict[str, Any]]:
    """Round the last weights to float16, measure them, and say where they come from.

    The last weights rather than the best: the best of several evaluations on the validation images
    would flatter the figure.
    """
    row = get_row(NAME)
    model = load(out / "run" / "last")
    if model.categories != row.classes:
        raise SystemExit(f"the run's classes are not the row's: {', '.join(model.categories)}")
    weights = out / packaged_weights().name
    tensors = {
        name: value.half().contiguous() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    wrong = [name for name, value in tensors.items() if not value.isfinite().all()]
    if wrong:
        raise SystemExit(f"float16 cannot hold {', '.join(wrong)}")
    metadata = {"format": "pt", "model": row.name, "license": row.license}
    write_safetensors(tensors, weights, metadata)
    model.load_state_dict({name: value.float() if value.is_floating_point() else value
                           for name, value in tensors.items()})  # fmt: skip
    found = verify(model.eval(), validation(), run=out / f"verified-{time.time_ns()}")
    box, mask = 100 * found.box.figures["AP"], 100 * found.mask.figures["AP"]
    log = [json.loads(line) for line in (out / "run" / "log.jsonl").read_text().splitlines()]
    provenance = {
        "model": row.name,
        "box_ap": round(box, 4),
        "mask_ap": round(mask, 4),
        "parameters": sum(value.numel() for value in model.parameters()),
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "script": "scripts/train_demo.py",
        "command": ["vitadapter-zoo", *arguments(Path("OUT"), options)],
        "seed": options.seed,
        "data": data,
        "validation_sha256": validation().sha256,
        "device": _device(options.device),
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in PACKAGES},
        "log": _thinned(log),
    }
    return weights, provenance | _origin(options.start)


def _origin(start: str) -> dict[str, Any]:
    """The provenance of the weights that a run goes on from, which lies beside them."""
    if start == "scratch":
        return {}
    found = json.loads(Path(start).with_suffix(".json").read_text())
    found["log"] = [entry for entry in found["log"] if "loss" not in entry]  # the evaluations
    return {"started_from": found}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:
        return None


def _device(name: str) -> str:
    if name.startswith("cuda"):
        return torch.cuda.get_device_name(name)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _thinned(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All evaluations, and some of the other lines, with four digits."""
    plain = [entry for entry in log if "loss" in entry]
    kept = {id(entry) for entry in plain[:: max(1, len(plain) // LOG_LINES)]} | {
        id(entry) for entry in log if "loss" not in entry
    }
    return [
        {
            key: float(f"{value:.4g}") if isinstance(value, float) else value
            for key, value in entry.items()
        }
        for entry in log
        if id(entry) in kept
    ]


if __name__ == "__main__":
    main()
