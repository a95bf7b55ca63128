"""Tests of the compiled libraries: building, finding and checking them, and their input checks."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from forked import BEFORE_THE_HUB, COMMAND, Done, workers
from operators import Arguments, random_arguments

from vitadapter_zoo.ops import build, paths
from vitadapter_zoo.ops.deform_attn import alert_nondeterministic
from vitadapter_zoo.ops.library import TOLERANCE, check, find, implementation, worst

PROJECT = Path(__file__).parents[2]


def run(code: str, *arguments: str | Path, package: Path = PROJECT, **variables: str) -> Done:
    """Run code in a process of its own with the package in the folder ``package``."""
    return workers(BEFORE_THE_HUB).run(
        code,
        *map(str, arguments),
        cwd=Path("/"),
        environment={"PYTHONPATH": str(package), **variables},
    )


def test_the_compiled_operator_is_used_here() -> None:
    found = implementation("cpu")
    assert found.compiled, found.why
    assert check(torch.device("cpu")) < TOLERANCE / 100


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_check_rejects_a_kernel_that_returns_nan(place: int) -> None:
    errors = [1e-7, 2e-7]
    assert worst(errors) == 2e-7
    errors.insert(place, math.nan)
    assert not worst(errors) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_check_does_not_depend_on_the_default_dtype(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        assert check(torch.device("cpu")) < TOLERANCE / 100
    finally:
        torch.set_default_dtype(torch.float32)


def test_gradients_on_cuda_raise_or_warn_in_deterministic_mode() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        alert_nondeterministic(torch.device("cpu"))
        with pytest.raises(RuntimeError, match="on CUDA is not deterministic"):
            alert_nondeterministic(torch.device("cuda", 0))
        torch.use_deterministic_algorithms(True, warn_only=True)
        with pytest.warns(UserWarning, match="on CUDA is not deterministic"):
            alert_nondeterministic(torch.device("cuda", 0))
    finally:
        torch.use_deterministic_algorithms(False)
    alert_nondeterministic(torch.device("cuda", 0))


def test_kernels_reject_inputs_that_would_read_out_of_bounds() -> None:
    value, shapes, locations, weights = random_arguments(0, [(4, 6)])
    wrong: dict[str, Arguments] = {
        "do not add up": (value, shapes + 1, locations, weights),
        "spatial_shapes do not": (value, torch.tensor([[2**62, 4]]), locations, weights),
        "do not fit": (value, shapes, locations[:, :3], weights),
        "wrong number of dimensions": (value[0], shapes, locations, weights),
        "must be int64": (value, shapes.int(), locations, weights),
        "must be float32": (value, shapes, locations.double(), weights),
        "have the dtype of value": (value, shapes, locations, weights.double()),
        "on the CPU value must be": (value.half(), shapes, locations, weights),
    }
    implementation("cpu")  # loads the kernels
    for message, arguments in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            torch.ops.vitadapter_zoo._ms_deform_attn(*arguments)
        grad = torch.zeros(1, 5, 64, dtype=arguments[0].dtype)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.vitadapter_zoo._ms_deform_attn_backward(grad, *arguments)
    with pytest.raises(RuntimeError, match="the gradient's shape"):
        torch.ops.vitadapter_zoo._ms_deform_attn_backward(
            torch.zeros(1, 5, 63), value, shapes, locations, weights
        )


EACH_SET = """
import torch
from operators import random_arguments
from vitadapter_zoo.ops import ms_deform_attn, reference
from vitadapter_zoo.ops.library import implementation
print(implementation("cpu").why)
for channels in (5, 32, 64):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        shapes = [(9, 7), (3, 1)]
        arguments = random_arguments(1, shapes, queries=99, channels=channels, dtype=dtype)
        result, right = ms_deform_attn(*arguments), reference.ms_deform_attn(*arguments)
        near = 2e-2 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(result, right, rtol=near, atol=near)
"""


@pytest.mark.parametrize("name", ["portable", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_result(name: str) -> None:
    done = run(EACH_SET, VITADAPTER_ZOO_CPU=name)
    assert done.returncode == 0, done.stderr
    assert f"({name})" in done.stdout


@pytest.mark.parametrize("name", [paths.CPU_LIBRARY, paths.CUDA_LIBRARY])
def test_libraries_use_only_torch_s_stable_abi(name: str) -> None:
    path = find(name)
    if path is None and name == paths.CUDA_LIBRARY:
        assert not build.cuda_wanted()
        return
    assert path is not None
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True
    ).stdout.split()
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    # Mangled names contain the length of each part: 2at, 3c10, 5torch.
    assert [symbol for symbol in symbols if "2at" in symbol[:6] or "3c10" in symbol[:7]] == []
    assert [symbol for symbol in symbols if symbol.startswith("_Z") and "5torch" in symbol] == []


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package and its sources without compiled libraries."""
    folder = tmp_path / "copy"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PROJECT / "vitadapter_zoo", folder / "vitadapter_zoo", ignore=ignored)
    shutil.copytree(PROJECT / "csrc", folder / "csrc")
    return folder


COMPUTE = """
import torch
from vitadapter_zoo.ops import ms_deform_attn
value, shapes = torch.ones(1, 6, 1, 8), torch.tensor([[2, 3]])
for _ in range(2):
    result = ms_deform_attn(value, shapes, torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1, 1))
print(result.sum().item())
"""  # noqa: E501


@pytest.fixture
def quick_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler without optimisation, for libraries whose results are what is tested.

    The library that the other tests use is compiled with optimisation.
    """
    path = tmp_path / "g++"
    path.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    path.chmod(0o755)
    for variable in ("CC", "CXX"):
        monkeypatch.setenv(variable, str(path))


BUILD = 'import runpy\nrunpy.run_module("vitadapter_zoo.ops.build", run_name="__main__")'


def test_without_a_library_the_fallback_is_used_with_one_warning(copy: Path) -> None:
    without = run(COMPUTE, package=copy)
    assert without.stdout == "8.0\n", without.stderr
    assert without.stderr.count("UserWarning") == 1
    assert "`vitadapter-zoo build-op` compiles it here" in without.stderr
    refused = run(COMPUTE, package=copy, VITADAPTER_ZOO_OP="compiled")
    assert "VITADAPTER_ZOO_OP=compiled, but the compiled operator" in refused.stderr


@pytest.mark.usefixtures("quick_compiler")
def test_a_library_with_wrong_results_is_rejected(copy: Path) -> None:
    header = copy / "csrc" / "sampling.h"
    right, wrong_offset = "convert<F>(size) - 0.5f", "convert<F>(size) - 0.25f"
    assert right in header.read_text()
    header.write_text(header.read_text().replace(right, wrong_offset))
    assert run(COMMAND, "build-op", package=copy, VITADAPTER_ZOO_CUDA="0").returncode == 0
    wrong = run(COMPUTE, package=copy)
    assert wrong.stdout == "8.0\n"
    assert "gives wrong results here" in wrong.stderr


PASTE = """
import torch
from vitadapter_zoo.ops import masks, paste_rle
for _ in range(2):
    print(paste_rle(torch.ones(1, 1, 1), torch.tensor([[1.0, 1, 4, 3]]), (4, 5)))
print(masks.implementation().compiled)
"""


@pytest.mark.usefixtures("quick_compiler")
def test_build_op_replaces_the_fallback_and_only_wrong_masks_are_rejected(
    copy: Path,
) -> None:
    """Compile sources with a wrong mask kernel and correct deformable attention."""
    source = copy / "csrc" / "masks.cpp"
    written = source.read_text().replace(
        "sum = __builtin_fmaf(se[y], se_weight, sum);", "sum = se[y] * se_weight + sum;"
    )
    written = written.replace("sum += se[y] * se_weight;", "sum += se[y] * se_weight * 1.0000001f;")
    source.write_text(written)
    built = run(COMMAND, "build-op", package=copy, VITADAPTER_ZOO_CUDA="0")
    assert built.returncode == 0, built.stderr
    compiled = run(COMPUTE, package=copy)
    assert (compiled.stdout, compiled.stderr) == ("8.0\n", "")
    assert run(COMPUTE, package=copy, VITADAPTER_ZOO_OP="compiled").stdout == "8.0\n"

    done = run(PASTE, package=copy)
    assert done.stdout == "['5220003']\n" * 2 + "False\n", done.stderr
    assert done.stderr.count("UserWarning") == 1
    assert "does not give their results here" in done.stderr
    refused = run(PASTE, package=copy, VITADAPTER_ZOO_OP="compiled")
    assert "pastes masks unlike this torch's grid_sample" in refused.stderr
    report = json.loads(run(COMMAND, "env", "--json", package=copy).stdout)["operator"]
    assert report["cpu"]["compiled"] is True
    assert report["cpu"]["why"].startswith(built.stdout.strip())
    assert report["masks"]["compiled"] is False


def test_build_op_shows_the_compiler_s_error(copy: Path, zoo_home: Path) -> None:
    (copy / "csrc" / "cpu.cpp").write_text("int broken(\n")
    done = run(COMMAND, "build-op", package=copy, VITADAPTER_ZOO_CUDA="0")
    assert done.returncode == 2
    assert "cpu.cpp:1:12: error: expected" in done.stderr
    assert "Traceback" not in done.stderr
    left = [path.name for path in (zoo_home / "op").iterdir()]
    assert left == ["build-op.log"]


def test_env_prints_text_and_json() -> None:
    text = run(COMMAND, "env").stdout
    assert f"torch                    {torch.__version__.split('+')[0]}" in text
    assert "compiled: " in text
    found = json.loads(run(COMMAND, "env", "--json", VITADAPTER_ZOO_OP="reference").stdout)
    reference = {"compiled": False, "why": "VITADAPTER_ZOO_OP=reference"}
    assert found["operator"]["cpu"] == found["operator"]["masks"] == reference
    assert found["machine"]["threads of torch"] >= 1


def test_invalid_values_of_environment_variables_are_rejected(tmp_path: Path) -> None:
    done = run(COMPUTE, VITADAPTER_ZOO_OP="fast")
    assert "VITADAPTER_ZOO_OP is 'fast'; it may be 'compiled' or 'reference'" in done.stderr
    done = run(BUILD, tmp_path, VITADAPTER_ZOO_CUDA="yes")
    assert "VITADAPTER_ZOO_CUDA is 'yes'; it may be 0 or 1" in done.stderr
