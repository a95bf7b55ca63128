"""Measure the overhead of verification, of mask encoding and of scoring.

    python benchmarks/verify.py [--images 40] [--model adapter-t-deit-3x] [--scored 5000]
    python benchmarks/verify.py --hours 20

The measurements alternate in a single process, with stand-in weights and generated images:

- ``verify``: calls of ``vitadapter_zoo.verify``, compared with the network alone (``detect`` on
  preprocessed inputs) on the same images, in alternating blocks of five.
- ``masks``: pasting, encoding and recording 100 masks on 640 x 480, compared with resampling into
  whole-image masks and encoding these (see masks.py). Both are recorded in the same way.
- ``scoring``: box and mask metrics of 5,000 images with 100 detections each, compared with direct
  calls of hotcoco, with faster-coco-eval and, on a tenth of the images, with pycocotools.

``--hours N`` instead verifies N images of 640 x 480 with every row and prints the estimated time
for the 5,000 images of val2017.
"""

import argparse
import contextlib
import copy
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "benchmarks")]

import masks as mask_ways  # noqa: E402
import scenes  # noqa: E402
import standins  # noqa: E402
from hotcoco import COCO, COCOeval  # noqa: E402
from hotcoco import mask as coco_mask  # noqa: E402

import vitadapter_zoo  # noqa: E402
from vitadapter_zoo.catalog import COCO_CATEGORY_IDS, COCO_CLASSES  # noqa: E402
from vitadapter_zoo.evaluation.dataset import Dataset, read_dataset  # noqa: E402
from vitadapter_zoo.evaluation.run import ImageResult, open_run  # noqa: E402
from vitadapter_zoo.evaluation.scoring import FIGURES, KINDS, Annotations  # noqa: E402
from vitadapter_zoo.models import MaskRCNN, build  # noqa: E402
from vitadapter_zoo.ops.masks import paste_rle  # noqa: E402

BLOCK = 5
SIZE = (480, 640)


def seconds(work: Callable[[], Any]) -> float:
    """Measure the seconds of a call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def categories() -> list[dict[str, Any]]:
    """Return COCO's categories in the format of an annotation file."""
    pairs = zip(COCO_CATEGORY_IDS, COCO_CLASSES, strict=True)
    return [{"id": key, "name": name} for key, name in pairs]


def standin(name: str, device: str) -> MaskRCNN:
    """Build the row's detector with stand-in weights."""
    with torch.device("meta"):
        model = build(vitadapter_zoo.get_row(name))
    model.load_state_dict(standins.state_dict(name), assign=True)
    return model.to(device).eval()


def measure_hours(count: int, folder: Path, device: str) -> None:
    """Estimate the time of val2017 with each row from ``count`` images."""
    pictures = scenes.draw_pictures(folder / "val2017", count, size=SIZE)
    data = block_data(pictures, folder / "pictures.json")
    for name in vitadapter_zoo.list_models():
        model = standin(name, device)
        with torch.inference_mode():
            model.detect([model.preprocess(pictures[0])])
        taken = seconds(lambda: vitadapter_zoo.verify(model, data, run=folder / name))  # noqa: B023
        print(
            f"hours    {name:<28} {taken / count:6.2f} s an image, "
            f"{5000 * taken / count / 3600:5.1f} h for 5,000 ({count} measured)",
            flush=True,
        )


def measure_verify(name: str, count: int, folder: Path, device: str) -> None:
    """Measure verifications of blocks of images and the network alone on the same images."""
    model = standin(name, device)
    pictures = scenes.draw_pictures(folder / "val2017", count, size=SIZE)
    whole = {"verify": 0.0, "bare": 0.0}
    with torch.inference_mode():
        model.detect([model.preprocess(pictures[0])])  # warm-up: the first pass maps the memory
    ratios = []
    for start in range(0, count, BLOCK):
        block = pictures[start : start + BLOCK]
        data = block_data(block, folder / f"block-{start}.json")
        prepared = [model.preprocess(path) for path in block]

        def bare(prepared: list[Any] = prepared) -> None:
            with torch.inference_mode():
                for one in prepared:
                    model.detect([one])

        def verify(data: Dataset = data, start: int = start) -> None:
            vitadapter_zoo.verify(model, data, run=folder / f"run-{start}")

        order: list[tuple[str, Callable[[], None]]] = [("bare", bare), ("verify", verify)]
        taken = {}
        for kind, work in order if start // BLOCK % 2 else order[::-1]:
            taken[kind] = seconds(work)
            whole[kind] += taken[kind]
        ratios.append(taken["verify"] / taken["bare"])
    print(
        f"verify   {name}, {count} images: {whole['verify']:.1f} s, the network alone "
        f"{whole['bare']:.1f} s = {whole['verify'] / whole['bare']:.3f}x; by block of {BLOCK}: "
        f"median {statistics.median(ratios):.3f}x"
    )


def block_data(pictures: list[Path], path: Path) -> Dataset:
    """Write a data set of some images with an object in each."""
    height, width = SIZE
    box = {"size": [height, width], "counts": _square(height, width)}
    content = {
        "images": [
            {"id": int(one.stem), "file_name": one.name, "height": height, "width": width}
            for one in pictures
        ],
        "annotations": [
            {
                "id": index + 1,
                "image_id": int(one.stem),
                "category_id": 1,
                "bbox": [10.0, 10.0, 50.0, 50.0],
                "area": 2500.0,
                "iscrowd": 0,
                "segmentation": box,
            }
            for index, one in enumerate(pictures)
        ],
        "categories": categories(),
    }
    path.write_text(json.dumps(content))
    return read_dataset(path, pictures[0].parent)


def _square(height: int, width: int) -> str:
    pixels = np.zeros((height, width), np.uint8, order="F")
    pixels[10:60, 10:60] = 1
    return scenes.text(coco_mask.encode(pixels)["counts"])


def measure_masks(folder: Path, rounds: int = 9) -> None:
    """Measure pasting, encoding and recording the masks of an image with two methods."""
    probabilities, boxes = mask_ways.sample(100, SIZE)
    ways = {"ours": paste_rle, "whole image": mask_ways.whole_image}
    times: dict[str, list[float]] = {name: [] for name in ways}
    texts: dict[str, list[str]] = {}
    with open_run(folder / "masks", {}) as run:

        def record(name: str) -> None:
            texts[name] = ways[name](probabilities, boxes, SIZE)
            values = boxes.tolist()
            run.append(ImageResult(1, SIZE, values, [0.5] * 100, [1] * 100, texts[name], "0"))

        for _ in range(rounds):
            for name in ways:
                times[name].append(seconds(lambda name=name: record(name)))  # type: ignore[misc]
    if texts["ours"] != texts["whole image"]:
        raise SystemExit("the RLEs of the two methods differ")
    ours, other = (statistics.median(times[name]) for name in ways)
    print(
        f"masks    paste, encode, record 100: {ours * 1e3:.2f} ms, into whole images "
        f"{other * 1e3:.1f} ms = {other / ours:.1f}x as long; equal run lengths"
    )


def scored_data(count: int, folder: Path) -> tuple[Path, list[ImageResult]]:
    """Create annotations with seven objects per image, and 100 detections per image."""
    rng = np.random.default_rng(0)
    probabilities, boxes = mask_ways.sample(400, SIZE)
    texts = paste_rle(probabilities, boxes, SIZE)
    areas = coco_mask.area([{"size": list(SIZE), "counts": one} for one in texts])
    corners = boxes.tolist()
    usable = [index for index, area in enumerate(areas) if area > 0]
    xywh = {i: [corners[i][0], corners[i][1], corners[i][2] - corners[i][0],
                corners[i][3] - corners[i][1]] for i in usable}  # fmt: skip
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": categories()}
    results = []
    for image_id in range(1, count + 1):
        content["images"].append(
            {"id": image_id, "file_name": "x.jpg", "height": SIZE[0], "width": SIZE[1]}
        )
        objects = rng.choice(usable, 7)
        keys = rng.choice(COCO_CATEGORY_IDS, 7)
        for index, key in zip(objects.tolist(), keys.tolist(), strict=True):
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": key,
                    "bbox": xywh[index],
                    "area": float(areas[index]),
                    "iscrowd": 0,
                    "segmentation": {"size": list(SIZE), "counts": texts[index]},
                }
            )
        found = [*objects.tolist(), *rng.choice(usable, 93).tolist()]
        found_keys = [*keys.tolist(), *rng.choice(COCO_CATEGORY_IDS, 93).tolist()]
        scores = np.sort(rng.random(100))[::-1].tolist()
        order = rng.permutation(100).tolist()
        results.append(
            ImageResult(
                image_id, SIZE, [xywh[found[i]] for i in order], scores,
                [found_keys[i] for i in order], [texts[found[i]] for i in order],
            )
        )  # fmt: skip
    path = folder / f"scored-{count}.json"
    path.write_text(json.dumps(content))
    return path, results


def direct(
    path: Path,
    detections: dict[str, list[dict[str, Any]]],
    coco_class: Any,
    eval_class: Any,
) -> list[float]:
    """Compute box and mask metrics by any implementation of pycocotools' interface."""
    figures: list[float] = []
    with contextlib.redirect_stdout(io.StringIO()):
        coco = coco_class(str(path))
        for kind in ("bbox", "segm"):
            evaluation = eval_class(coco, coco.loadRes(detections[kind]), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            figures += [float(value) for value in evaluation.stats[:12]]
    return figures


def measure_scoring(count: int, folder: Path, rounds: int = 5) -> None:
    """Measure box and mask metrics with this package, with hotcoco and with the others."""
    for size, others in ((count, False), (count // 10, True)):
        path, results = scored_data(size, folder)
        boxes = [one for result in results for one in result.to_coco()]
        detections = {
            "bbox": boxes,
            "segm": [{k: v for k, v in one.items() if k != "bbox"} for one in boxes],
        }

        def ours(path: Path = path, results: list[ImageResult] = results) -> list[float]:
            annotations = Annotations(read_dataset(path, folder))
            table = annotations.tabulate(results)
            scores = [annotations.score(table, kind) for kind in KINDS]
            return [one.figures[name] for one in scores for name in FIGURES]

        ways: dict[str, Callable[[], list[float]]] = {
            "ours": ours,
            "hotcoco": partial(direct, path, detections, COCO, COCOeval),
        }
        if others:
            import faster_coco_eval
            import pycocotools.coco
            import pycocotools.cocoeval

            classes = {
                "faster-coco-eval": (faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster),
                "pycocotools": (pycocotools.coco.COCO, pycocotools.cocoeval.COCOeval),
            }
            for name, pair in classes.items():  # the libraries change the dictionaries they get
                own = copy.deepcopy(detections)
                ways[name] = partial(direct, path, own, *pair)
        times: dict[str, list[float]] = {name: [] for name in ways}
        figures: dict[str, list[float]] = {}
        for _ in range(1 if others else rounds):
            for name, way in ways.items():
                begin = time.perf_counter()
                figures[name] = way()
                times[name].append(time.perf_counter() - begin)
        for name, values in figures.items():
            if not np.allclose(values, figures["ours"], rtol=0, atol=1e-9):
                raise SystemExit(f"the metrics of {name} differ from this package's")
        base = statistics.median(times["hotcoco"])
        for name, taken in times.items():
            middle = statistics.median(taken)
            print(
                f"scoring  {size} images x 100, {name:<16} {middle:7.2f} s = "
                f"{middle / base:6.2f}x of hotcoco called directly"
            )


def main() -> None:
    """Run the measurements on the command line and print their results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--model", default="adapter-t-deit-3x")
    parser.add_argument("--scored", type=int, default=5000)
    parser.add_argument("--hours", type=int, metavar="N")
    parser.add_argument("--device", default="cpu", help="of the network")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.hours:
            measure_hours(options.hours, folder, options.device)
            return
        measure_masks(folder)
        measure_scoring(options.scored, folder)
        measure_verify(options.model, options.images, folder, options.device)


if __name__ == "__main__":
    main()
