"""The file formats of exported detectors: writing a detector in one, and running such a file."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.exporting.detector import INPUTS, OUTPUTS, STAGES, Exportable

Format = Literal["onnx", "openvino", "pt2", "aoti"]
FORMATS: tuple[str, ...] = get_args(Format)
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2", "aoti": ".aoti.pt2"}
# float16: the weights are stored in float16.
PRECISIONS: dict[str, tuple[str, ...]] = {
    "onnx": ("float32",),
    "openvino": ("float32", "float16"),
    "pt2": ("float32",),
    "aoti": ("float32",),
}
# What the stages before the detections are measured on: a file itself returns none.
STAGES_OF = {
    "onnx": "the ONNX graph with its stages as outputs",
    "openvino": "the ONNX graph that the file was made from, in ONNX Runtime",
    "pt2": "the exported program, before it was written",
    "aoti": "the exported program, before it was compiled",
}
OPSET = 18
Array = npt.NDArray[Any]
Arrays = list[Array]
# A function that computes a file's outputs from its inputs.
Runner = Callable[[dict[str, Array]], Arrays]


def check_packages(kind: Format) -> None:
    """Raise an error if a format's packages are missing.

    Raises:
        ZooError: naming the extra to install.
    """
    import importlib.util

    onnx = ("onnx", "onnxscript", "onnxruntime")
    needed = {"onnx": onnx, "openvino": (*onnx, "openvino")}
    missing = [name for name in needed.get(kind, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise ZooError(
            f"exporting to {kind} needs {', '.join(missing)}: pip install 'vitadapter-zoo[export]'"
        )


def decomposes(kind: Format) -> bool:
    """Whether the format knows no operators of this package."""
    return kind in ("onnx", "openvino")


def stages(
    kind: Format, detector: Exportable, example: Sequence[Tensor], path: Path, text: str
) -> Arrays:
    """Export a detector that returns its stages, and run the result on the example.

    ONNX and OpenVINO: the file at ``path`` is then the exported detector, without the stages.

    Args:
        kind: the format.
        detector: the detector, with stages.
        example: inputs in the order of `INPUTS`.
        path: the file to write.
        text: stored in the file, for its users.
    """
    with _quiet(), torch.no_grad():
        if not decomposes(kind):
            program = torch.export.export(detector, tuple(example), strict=False)
            return [output.numpy() for output in program.module()(*example)]
        import onnx

        file = path.with_suffix(SUFFIXES["onnx"])
        torch.onnx.export(
            detector, tuple(example), file, dynamo=True, opset_version=OPSET, external_data=False,
            input_names=list(INPUTS), output_names=[*OUTPUTS, *STAGES], verbose=False,
        )  # fmt: skip
        inputs = {name: value.numpy() for name, value in zip(INPUTS, example, strict=True)}
        outputs = runner("onnx", file)(inputs)
        network = onnx.load(file)
        del network.graph.output[len(OUTPUTS) :]
        entry = network.metadata_props.add()
        entry.key, entry.value = "vitadapter_zoo", text
        onnx.save(network, file)
        return outputs


def finish(
    kind: Format,
    detector: Exportable,
    example: Sequence[Tensor],
    path: Path,
    text: str,
    *,
    half: bool,
) -> None:
    """Write the file after `stages`, from a detector without stages.

    ``half`` stores the weights in float16 (OpenVINO). The other arguments are those of `stages`.
    """
    with _quiet(), torch.no_grad():
        if kind == "openvino":
            import openvino

            between = path.with_suffix(SUFFIXES["onnx"])
            network = openvino.convert_model(between)
            network.set_rt_info(text, ["vitadapter_zoo"])
            openvino.save_model(network, path, compress_to_fp16=half)
            between.unlink()
        elif kind != "onnx":
            program = torch.export.export(detector, tuple(example), strict=False)
            if kind == "pt2":
                torch.export.save(program, path, extra_files={"settings.json": text})
            else:
                # With its layouts the mask head's convolutions, whose batch is the number of
                # detections, give wrong results in torch 2.14.
                options = {
                    "layout_optimization": False,
                    "aot_inductor.metadata": {"vitadapter_zoo": text},
                }
                torch._inductor.aoti_compile_and_package(
                    program, package_path=str(path), inductor_configs=options
                )


def runner(kind: Format, path: Path) -> Runner:
    """Load a file with its own runtime; return a function that runs it."""
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda inputs: list(session.run(None, inputs))
    if kind == "openvino":
        import openvino

        # float32, as the comparison expects; by default it computes in bfloat16 where it can.
        precise = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(path, "CPU", precise)
        return lambda inputs: [np.array(value) for value in compiled(inputs).values()]
    call: Callable[..., Any]
    if kind == "pt2":
        call = torch.export.load(path).module()
    else:
        call = torch._inductor.aoti_load_package(str(path))

    def run(inputs: dict[str, Array]) -> Arrays:
        with torch.no_grad():
            outputs = call(*(torch.from_numpy(inputs[name]) for name in INPUTS))
        return [output.numpy() for output in outputs]

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' notes to their own developers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
