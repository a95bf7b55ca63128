"""Exported detectors: each format computes what the detector computes, without this package too."""

import json
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import vitadapter_zoo
from vitadapter_zoo import MaskRCNN, ZooError, get_row
from vitadapter_zoo.backends.comparison import matches
from vitadapter_zoo.cli import main
from vitadapter_zoo.errors import ConfigError
from vitadapter_zoo.exporting import detector as graph
from vitadapter_zoo.exporting import export as exporting
from vitadapter_zoo.exporting import formats, postprocess
from vitadapter_zoo.images import NetworkInput, network_input, read_image

SIZE = (128, 160)

# Runs a file with its runtime and the shipped postprocess.py; sees no other package than these.
STRANGER = """
import json, sys
import numpy as np
folder, name, pixels, kind = sys.argv[1:5]
sys.path.insert(0, folder)
import postprocess
settings = json.load(open(f"{folder}/{name}.json"))
prepared = postprocess.prepare(np.load(pixels), settings)
if kind == "onnx":
    import onnxruntime
    session = onnxruntime.InferenceSession(f"{folder}/{name}.onnx")
else:
    import openvino
    compiled = openvino.Core().compile_model(
        f"{folder}/{name}.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
for threshold in sys.argv[5:]:
    inputs = prepared.inputs(float(threshold))
    if kind == "onnx":
        outputs = session.run(settings["outputs"], inputs)
    else:
        outputs = list(compiled(inputs).values())
    found = postprocess.finish(outputs, prepared, settings)
    np.savez(f"{threshold}.npz", boxes=found.boxes, scores=found.scores, labels=found.labels,
             masks=found.masks, names=np.array(found.names, dtype=str))
assert not [name for name in sys.modules if name.split(".")[0] in ("vitadapter_zoo", "torch")]
"""


@pytest.fixture(scope="module")
def model() -> MaskRCNN:
    return vitadapter_zoo.load("adapter-n-emoji")


def picture(number: int) -> Path:
    files = get_row("adapter-n-emoji").data_files
    assert files is not None
    return sorted(files[1].iterdir())[number]


def expected(model: MaskRCNN, pixels: np.ndarray, threshold: float) -> vitadapter_zoo.Detections:
    """The detector's own result on the input that the file gets."""
    prepared = postprocess.prepare(pixels, exporting.settings_of(model, SIZE))
    given = NetworkInput(
        torch.from_numpy(prepared.image), prepared.resized, prepared.original, prepared.scale
    )
    return model([given], threshold)[0]


@pytest.mark.parametrize("kind", ["onnx", pytest.param("openvino", marks=pytest.mark.slow)])
def test_a_file_without_this_package_gives_the_same_detections(
    kind: str, model: MaskRCNN, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    written = vitadapter_zoo.export(model, out, format=kind, sizes=[SIZE])  # type: ignore[arg-type]
    assert written[0].path.name == f"adapter-n-emoji-128x160{formats.SUFFIXES[kind]}"
    assert "proposals" in {stage.stage for stage in written[0].differences}
    assert all(stage.agrees for stage in written[0].differences)
    files = {path.suffix for path in out.iterdir()}
    assert files == {".json", ".py"} | ({".onnx"} if kind == "onnx" else {".xml", ".bin"})
    pixels = read_image(picture(1))
    np.save(tmp_path / "pixels.npy", pixels)
    thresholds = (0.999, 0.3, 0.0005)
    arguments = [out, "adapter-n-emoji-128x160", tmp_path / "pixels.npy", kind, *thresholds]
    code = f"import sys; sys.path.append({sysconfig.get_path('purelib')!r})\n{STRANGER}"
    subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, *map(str, arguments)], check=True, cwd=tmp_path
    )
    counts = []
    for threshold in thresholds:
        found = np.load(tmp_path / f"{threshold}.npz")
        wanted = expected(model, pixels, threshold)
        counts.append(len(wanted))
        shift = 1e4 * wanted.labels[:, None]
        pairs = matches(
            torch.from_numpy(found["boxes"]) + 1e4 * torch.from_numpy(found["labels"])[:, None],
            torch.from_numpy(found["scores"]), wanted.boxes + shift, wanted.scores,
        )  # fmt: skip
        # Of more than 100 detections, rounding decides which are the last that count.
        if threshold > 0.001:
            assert len(found["boxes"]) == len(wanted)
            assert (pairs >= 0).all()
        else:
            assert (pairs >= 0).double().mean() > 0.97
        rows = pairs[pairs >= 0].numpy()
        differing = found["masks"][rows] != wanted.masks[pairs >= 0].numpy()
        assert np.count_nonzero(differing) <= 1e-3 * differing.size
        names = [wanted.categories[label] for label in wanted.labels[pairs >= 0].tolist()]
        assert found["names"][rows].tolist() == names
    assert counts[0] == 0 < counts[1] < counts[2] == 100


def test_torch_export_keeps_the_operator(model: MaskRCNN, tmp_path: Path) -> None:
    (tmp_path / "adapter-n-emoji-128x160.pt2").write_bytes(b"of an earlier export")
    written = vitadapter_zoo.export(model, tmp_path, format="pt2", sizes=[SIZE], force=True)
    assert all(stage.agrees for stage in written[0].differences)
    program = torch.export.load(written[0].path)
    targets = {str(node.target) for node in program.graph.nodes}
    assert any("vitadapter_zoo" in target and "ms_deform_attn" in target for target in targets)

    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ZooError, match=r"adapter-n-emoji-128x160\.pt2 is there already: --force"):
        vitadapter_zoo.export(model, tmp_path, format="pt2", sizes=[SIZE])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_aot_inductor(model: MaskRCNN, tmp_path: Path) -> None:
    written = vitadapter_zoo.export(model, tmp_path, format="aoti", sizes=[SIZE])
    assert written[0].path.name.endswith(".aoti.pt2")
    metadata = torch._inductor.aoti_load_package(str(written[0].path)).loader.get_metadata()
    assert json.loads(metadata["vitadapter_zoo"]) == exporting.settings_of(model, SIZE)
    assert all(stage.agrees for stage in written[0].differences)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapter-t-deit-3x", "vit-t-deit-3x", "adapter-s-deit-3x-nofpn"])
def test_other_networks(
    name: str, standin_model: Callable[[str], MaskRCNN], tmp_path: Path
) -> None:
    written = vitadapter_zoo.export(standin_model(name), tmp_path, sizes=[(128, 160), (160, 128)])
    assert [one.size for one in written] == [(128, 160), (160, 128)]
    assert all(stage.agrees for one in written for stage in one.differences)


@pytest.mark.slow
def test_the_uniperceiver_backbone(
    standin_model: Callable[[str], MaskRCNN], tmp_path: Path
) -> None:
    """The features alone: the whole detector of this size takes minutes."""
    import onnxruntime
    import openvino

    exportable = graph.Exportable(
        standin_model("adapter-b-uniperceiver-3x"), SIZE, decomposed=True, stages=False
    )
    image = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = standin_model("adapter-b-uniperceiver-3x").backbone(image)
        torch.onnx.export(
            exportable.model.backbone, (image,), tmp_path / "backbone.onnx", dynamo=True,
            opset_version=formats.OPSET, external_data=False, input_names=["image"], verbose=False,
        )  # fmt: skip
    session = onnxruntime.InferenceSession(tmp_path / "backbone.onnx")
    compiled = openvino.Core().compile_model(
        tmp_path / "backbone.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    for found in (session.run(None, {"image": image.numpy()}), compiled([image.numpy()]).values()):
        for ours, theirs in zip(wanted, found, strict=True):
            largest = float(ours.abs().max())
            np.testing.assert_allclose(theirs, ours.numpy(), rtol=0, atol=1e-4 * largest)


def test_postprocess_prepares_as_the_detector_does(model: MaskRCNN) -> None:
    """Every kind of resizing: smaller, larger, half, by different factors, and none."""
    pixels = read_image(picture(2))
    generator = np.random.default_rng(0)
    for shape in ((200, 300), (64, 50), (256, 320), (512, 640), (333, 97), pixels.shape[:2]):
        one = generator.integers(0, 256, (*shape, 3), dtype=np.uint8)
        settings = exporting.settings_of(model, (256, 320))
        found = postprocess.prepare(one, settings)
        row = model.row
        wanted = network_input(one, (320, 256), row.mean, row.std)
        if found.resized == wanted.resized:  # the detector also fits portrait images
            height, width = wanted.tensor.shape[2:]
            np.testing.assert_allclose(
                found.image[..., :height, :width], wanted.tensor.numpy(), atol=2e-6
            )
            assert found.scale == pytest.approx(wanted.scale, rel=1e-7)
    assert found.original == pixels.shape[:2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tflite"}, "'tflite' is none of onnx, openvino, pt2, aoti"),
        ({"sizes": [(100, 128)]}, "100x128 is outside the range"),
        ({"sizes": [(64, 8192)]}, "64x8192 is outside the range"),
        ({"sizes": []}, "no size"),
        ({"precision": "int8"}, "onnx has no precision 'int8'; there are onnx: float32; openvino"),
        ({"precision": "float16"}, "onnx has no precision 'float16'"),
    ],
)
def test_wrong_arguments_are_one_error(
    options: dict[str, object], message: str, model: MaskRCNN, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        vitadapter_zoo.export(model, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_file_that_computes_something_else_is_refused(
    model: MaskRCNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "RPN_NMS", 0.3)
    with pytest.raises(ZooError, match=r"computes something else than the detector, first in prop"):
        vitadapter_zoo.export(model, tmp_path / "out", format="pt2", sizes=[SIZE])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("force", [False, True])
def test_an_input_is_never_replaced(force: bool, model: MaskRCNN, tmp_path: Path) -> None:
    given = tmp_path / "adapter-n-emoji-128x160.json"
    given.write_bytes(picture(0).read_bytes())
    with pytest.raises(ZooError, match="never replaced"):
        vitadapter_zoo.export(model, tmp_path, format="pt2", sizes=[SIZE], image=given, force=force)
    assert given.read_bytes() == picture(0).read_bytes()
    assert list(tmp_path.iterdir()) == [given]


@pytest.mark.parametrize("name", ["postprocess.py", "adapter-n-emoji-128x160.json"])
def test_a_file_of_somebody_else_is_not_replaced(
    name: str, model: MaskRCNN, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ZooError, match=f"{name} is there already"):
        vitadapter_zoo.export(model, tmp_path, format="pt2", sizes=[SIZE])
    assert (tmp_path / name).read_text() == "mine"


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    half = vitadapter_zoo.load("adapter-n-emoji", dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"bfloat16 on cpu: load it with"):
        vitadapter_zoo.export(half, tmp_path)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    run = CliRunner().invoke
    out = tmp_path / "out"
    done = run(
        main, ["export", "adapter-n-emoji", "--format", "pt2", "--size", "64x96", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert "adapter-n-emoji-64x96.pt2: largest differences from the detector" in done.stdout
    settings = json.loads((out / "adapter-n-emoji-64x96.json").read_text())
    assert (settings["height"], settings["width"]) == (64, 96)


def test_a_wrong_size_of_the_command_is_one_line() -> None:
    wrong = CliRunner().invoke(
        main, ["export", "adapter-n-emoji", "--format", "onnx", "--size", "64"]
    )
    assert wrong.exit_code == 2
    assert "'64' is not a size such as 800x1216" in wrong.stderr
