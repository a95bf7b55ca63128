"""CUDA graphs without a GPU: when one is captured, what it reads, and when it is discarded.

The graphs are those of `recorded`, which replay operators on the CPU as CUDA replays kernels.
"""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from recorded import RecordedCapture
from torch import Tensor, nn

from vitadapter_zoo.models import graphs as graphs_module
from vitadapter_zoo.models.graphs import CALLS_BEFORE, CaptureError, Graph, Graphs, Watch


class Counted:
    """Two layers, and how often Python ran them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 5)
        self.model = nn.Sequential(self.layer, nn.ReLU(), nn.Linear(5, 2)).eval()
        self.capture = RecordedCapture()
        self.graphs: Graphs[Tensor] = Graphs(self.capture)
        self.calls = 0

    def compute(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.model(x)

    def run(self, x: Tensor, key: object = None) -> Tensor:
        return self.graphs.run(self.compute, [x], [self.model], key)

    def check(self, rows: int = 4) -> bool:
        """Compare a run with the model; return whether it was a replay."""
        x = torch.randn(rows, 3, dtype=next(self.model.parameters()).dtype)
        before = self.calls
        found = self.run(x).clone()
        torch.testing.assert_close(found, self.model(x))
        return self.calls == before

    def warm_up(self, rows: int = 4) -> None:
        for _ in range(CALLS_BEFORE + 1):
            self.check(rows)
        assert self.check(rows), "there is no graph"


@pytest.fixture
def counted() -> Iterator[Counted]:
    counted = Counted()
    with torch.inference_mode():
        yield counted


def test_the_third_call_captures_and_later_calls_replay(counted: Counted) -> None:
    for _ in range(CALLS_BEFORE):
        assert not counted.check()
        assert len(counted.graphs) == 0
    counted.check()
    assert counted.capture.captured == len(counted.graphs) == 1
    for _ in range(3):
        assert counted.check()
    assert not counted.check(rows=7)
    assert counted.check()


def test_the_outputs_are_overwritten_by_the_next_replay(counted: Counted) -> None:
    counted.warm_up()
    first = counted.run(torch.zeros(4, 3))
    assert counted.run(torch.ones(4, 3)) is first


def test_weights_changed_in_place_are_up_to_date(counted: Counted) -> None:
    counted.warm_up()
    counted.layer.weight.mul_(2)
    counted.model.load_state_dict({k: v + 1 for k, v in counted.model.state_dict().items()})
    assert counted.check()
    assert counted.capture.captured == 1


def replace_data(model: nn.Sequential) -> None:
    weight = model.get_parameter("0.weight")
    weight.data = weight.data * 3


def replace_parameter(model: nn.Sequential) -> None:
    model[2].bias = nn.Parameter(torch.ones(2))


def replace_module(model: nn.Sequential) -> None:
    model[2] = nn.Linear(5, 2).eval()


def replace_strides(model: nn.Sequential) -> None:
    model.get_parameter("0.weight").data = torch.randn(3, 5).t()


def change_dtype(model: nn.Sequential) -> None:
    model.double()


def remove_module(model: nn.Sequential) -> None:
    model[1] = nn.Identity().eval()
    replace_data(model)


@pytest.mark.parametrize(
    "change",
    [
        replace_data, replace_parameter, replace_module, replace_strides, change_dtype,
        remove_module,
    ],
)  # fmt: skip
def test_replaced_weights_need_a_new_graph(
    counted: Counted, change: Callable[[nn.Sequential], None]
) -> None:
    counted.warm_up()
    counted.warm_up(rows=2)
    with torch.inference_mode(False), torch.no_grad():
        change(counted.model)
    assert not counted.check()
    assert len(counted.graphs) == 0
    counted.warm_up()
    assert counted.capture.captured == 3


def test_no_replay_where_python_has_to_run(counted: Counted) -> None:
    counted.warm_up()
    counted.model[1].train()
    assert not counted.check()
    counted.model[1].eval()
    assert counted.check()
    hook = counted.model[1].register_forward_hook(lambda module, args, output: output + 1)
    assert not counted.check()
    hook.remove()
    assert counted.check()
    counted.model[1].forward = lambda x: x
    assert not counted.check()
    del counted.model[1].forward
    counted.model._compiled_call_impl = counted.model._call_impl  # as after .compile()
    assert not counted.check()
    counted.model._compiled_call_impl = None
    torch.set_autocast_enabled("cuda", True)
    try:
        assert not counted.check()
    finally:
        torch.set_autocast_enabled("cuda", False)
    with torch.inference_mode(False), torch.enable_grad():
        assert not counted.check()
        assert counted.run(torch.ones(4, 3)).requires_grad
    assert counted.check()
    assert counted.capture.captured == 1


def test_a_key_has_graphs_of_its_own(counted: Counted) -> None:
    counted.warm_up()
    before = counted.calls
    counted.run(torch.zeros(4, 3), key="tf32")
    assert counted.calls == before + 1
    torch.use_deterministic_algorithms(True)
    try:
        assert not counted.check()
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_number_of_graphs_is_bounded(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_module, "MOST_GRAPHS", 2)
    monkeypatch.setattr(graphs_module, "CALLS_UNUSED", 6)
    counted.warm_up(rows=1)
    counted.warm_up(rows=2)
    for _ in range(CALLS_BEFORE + 1):
        assert not counted.check(rows=3)
        assert counted.check(rows=1)
    assert counted.check(rows=2)
    assert len(counted.graphs) == 2
    for _ in range(6):
        assert counted.check(rows=2)
    counted.check(rows=3)
    assert len(counted.graphs) == 2
    assert counted.check(rows=3)
    assert counted.check(rows=2)
    assert not counted.check(rows=1)


def test_the_number_of_counted_shapes_is_bounded(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs_module, "MOST_COUNTED", 3)
    for rows in range(1, 8):
        counted.check(rows)
    assert len(counted.graphs._calls) == 3


def test_a_failed_capture_warns_once_and_computes_as_usual(counted: Counted) -> None:
    def fail(*_: Any) -> Graph[Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    counted.graphs = Graphs(fail)
    for _ in range(CALLS_BEFORE):
        counted.check()
    with pytest.warns(UserWarning, match="without CUDA graphs.*stream is capturing$"):
        assert not counted.check()
    for _ in range(CALLS_BEFORE + 2):
        assert not counted.check()


@pytest.mark.parametrize("factor", [1.2, float("nan")])
def test_a_graph_with_wrong_results_is_refused(counted: Counted, factor: float) -> None:
    def wrong(compute: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Graph[Tensor]:
        graph = counted.capture(compute, inputs)

        def replay() -> None:
            graph.replay()
            graph.outputs.mul_(factor)

        return Graph(graph.inputs, graph.outputs, replay, graph.held)

    counted.graphs = Graphs(wrong)
    for _ in range(CALLS_BEFORE):
        counted.check()
    with pytest.warns(UserWarning, match="results differ"):
        assert not counted.check()
    assert len(counted.graphs) == 0


def test_copies_and_pickles_have_no_graphs(counted: Counted) -> None:
    counted.warm_up()
    for other in (copy.deepcopy(counted.graphs), pickle.loads(pickle.dumps(counted.graphs))):
        assert isinstance(other, Graphs)
        assert len(other) == 0


def test_what_a_graph_reads_is_kept(counted: Counted) -> None:
    outside = torch.ones(5)
    x = torch.zeros(4, 3, device="meta")  # the tensors of a device; the CPU's need no keeping
    far = outside.to("meta")
    with Watch() as watch:
        made = x + 1
        (made[:, :2] * far[:2]).sum().mul_(2)
    assert {id(tensor) for tensor in watch.inputs.values()} == {id(x), id(far)}


@pytest.mark.parametrize(
    "step",
    [
        lambda x: torch.ones(3).to(x.device, non_blocking=True),
        lambda x: torch.tensor(1.0).to(x.device),
        lambda x: x.copy_(torch.ones(4, 3), non_blocking=True),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.sum().item(),
        lambda x: torch.unique(x),
    ],
)
def test_a_graph_cannot_wait_or_copy_from_the_cpu(step: Callable[[Tensor], object]) -> None:
    x = torch.zeros(4, 3, device="meta")
    with torch.inference_mode(), Watch():
        (x + torch.tensor(1.0))[:, torch.zeros(2, dtype=torch.long, device="meta")]
        with pytest.raises(CaptureError):
            step(x)
