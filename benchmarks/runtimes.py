"""Measure the seconds per image of this package, ONNX Runtime and OpenVINO.

    python benchmarks/runtimes.py [ROW ...] [--size 800x1216] [--runs 5] [--threads 2]

The whole detector runs on one picture at batch size 1, up to the 28 x 28 masks. All runtimes get
the same input and the same number of threads, are loaded in one process and run in turn, so that
other load on the machine affects all of them. Each ratio is the median over the rounds of a
runtime's time divided by this package's float32 time in the same round: above 1 is slower than this
package.

float32: `export` has compared the file with the detector. bfloat16: this package's own dtype, and
OpenVINO's precision hint, which OpenVINO may decline. int8: ONNX Runtime's dynamic quantization of
the matrix products, which needs no calibration images and loses accuracy. ``matched`` is the share
of this package's float32 detections with a score of 0.3 or more that a runtime finds with an IoU
above 0.5 in the same class.

``adapter-n-emoji`` has its trained weights, other rows have stand-in weights.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torchvision.ops import box_iou

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
import standins

from vitadapter_zoo import MaskRCNN, export, get_row, load
from vitadapter_zoo.exporting import postprocess
from vitadapter_zoo.exporting.export import settings_of
from vitadapter_zoo.images import NetworkInput, read_image
from vitadapter_zoo.models import build

TRAINED = "adapter-n-emoji"
SCORE = 0.3
Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # boxes in network pixels, scores, labels
Run = Callable[[], Result]


def detector(name: str) -> MaskRCNN:
    """The row's detector, with stand-in weights where the package has none."""
    if name == TRAINED:
        return load(name)
    with torch.device("meta"):
        model = build(get_row(name))
    model.load_state_dict(standins.state_dict(name), assign=True)
    return model.eval()


def native(model: MaskRCNN, prepared: postprocess.Prepared) -> Run:
    """This package on the input that the other runtimes get."""
    tensor = torch.from_numpy(prepared.image)
    given = NetworkInput(tensor, prepared.resized, prepared.original, prepared.scale)
    scale = torch.tensor(prepared.scale)

    def run() -> Result:
        with torch.inference_mode():
            found = model.detect([given], SCORE)[0]
        return found.boxes.float() * scale, found.scores.float(), found.labels

    return run


def onnx_runtime(file: Path, prepared: postprocess.Prepared, threads: int) -> Run:
    """ONNX Runtime on its CPU provider."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda: _tensors(session.run(["boxes", "scores", "labels"], prepared.inputs(SCORE)))


def quantized(file: Path) -> Path:
    """The ONNX file with dynamically quantized matrix products, beside it."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = file.with_suffix(".int8.onnx")
    quantize_dynamic(
        file, target, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"]
    )
    return target


def open_vino(file: Path, prepared: postprocess.Prepared, threads: int, precision: str) -> Run:
    """OpenVINO on the CPU; ``precision`` is f32 or bf16."""
    import openvino

    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(file, "CPU", options)
    return lambda: _tensors(list(compiled(prepared.inputs(SCORE)).values())[:3])


def _tensors(outputs: list[np.ndarray]) -> Result:
    boxes, scores, labels = (torch.from_numpy(np.array(output)) for output in outputs)
    return boxes, scores, labels


def matched(found: Result, wanted: Result) -> float:
    """The share of the wanted detections that were found: IoU above 0.5, same class."""
    if not len(wanted[0]):
        return 1.0
    if not len(found[0]):
        return 0.0
    fits = (box_iou(wanted[0], found[0]) > 0.5) & (wanted[2][:, None] == found[2][None])
    return float(fits.any(dim=1).double().mean())


def runs(
    model: MaskRCNN, size: tuple[int, int], threads: int, folder: Path, image: Path
) -> dict[str, Run]:
    """Every runtime in every precision, loaded."""
    print(f"exporting {model.row.name}, which takes a minute or more", file=sys.stderr)
    file = export(model, folder, format="onnx", sizes=[size], image=image)[0].path
    prepared = postprocess.prepare(read_image(image), settings_of(model, size))
    half = copy.deepcopy(model).to(torch.bfloat16)
    return {
        "this package, float32": native(model, prepared),
        "this package, bfloat16": native(half, prepared),
        "ONNX Runtime, float32": onnx_runtime(file, prepared, threads),
        "ONNX Runtime, int8": onnx_runtime(quantized(file), prepared, threads),
        # OpenVINO reads ONNX itself, with the conversion that `export` uses.
        "OpenVINO, float32": open_vino(file, prepared, threads, "f32"),
        "OpenVINO, bfloat16": open_vino(file, prepared, threads, "bf16"),
    }


def measure(
    chosen: dict[str, Run], rounds: int
) -> tuple[dict[str, Result], dict[str, list[float]]]:
    """Run all in turn; their results, and the seconds of each round after one without measuring."""
    results = {name: run() for name, run in chosen.items()}
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    for _ in range(rounds):
        for name, run in chosen.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return results, seconds


def table(title: str, results: dict[str, Result], seconds: dict[str, list[float]]) -> Table:
    """Medians, ratios to the first runtime, and how many of its detections the others find."""
    first, *_ = results
    shown = Table(title=title)
    for column in ("runtime", "seconds", "ratio", "detections", "matched"):
        shown.add_column(column, justify="left" if column == "runtime" else "right")
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds[first], strict=True))
        share = matched(results[name], results[first])
        count = str(len(results[name][0]))
        shown.add_row(
            name, f"{statistics.median(times):.3f}", f"{ratio:.2f}", count, f"{share:.0%}"
        )
    return shown


def main() -> None:
    """Measure the rows of the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("rows", nargs="*", default=[TRAINED, "adapter-t-deit-3x"], metavar="ROW")
    parser.add_argument("--size", default="800x1216", metavar="HxW")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    height, width = (int(side) for side in options.size.split("x"))
    torch.set_num_threads(options.threads)
    files = get_row(TRAINED).data_files
    if files is None:
        raise SystemExit(f"the package lacks the pictures of {TRAINED}; install it again")
    for name in options.rows:
        image = sorted(files[1].iterdir())[1] if name == TRAINED else standins.PHOTO
        with tempfile.TemporaryDirectory() as folder:
            chosen = runs(detector(name), (height, width), options.threads, Path(folder), image)
            results, seconds = measure(chosen, options.runs)
        title = f"{name}, {options.size}, {options.threads} threads, {options.runs} rounds"
        Console().print(table(title, results, seconds))


if __name__ == "__main__":
    main()
