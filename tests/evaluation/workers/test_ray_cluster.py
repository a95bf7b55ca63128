"""Ray: a cluster of several nodes on this machine, one of which is killed."""

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import scenes

import vitadapter_zoo
from vitadapter_zoo import ZooError
from vitadapter_zoo.evaluation.dataset import Image
from vitadapter_zoo.evaluation.run import PREDICTIONS, Run

pytestmark = pytest.mark.ray

PICTURES = 20
KILLED_AT = 5  # results
STORE = 100 << 20  # bytes of each node's object store
# A dead node is noticed after some 10 s, which leaves a busy machine time to answer.
HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 10,
}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without CPUs and two nodes with two CPUs each."""
    # The nodes' processes have the tests' own paths and threads.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ray: Any = importlib.import_module("ray")
    utilities: Any = importlib.import_module("ray.cluster_utils")

    head = {"num_cpus": 0, "object_store_memory": STORE, "_system_config": HEALTH}
    cluster = utilities.Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_node_killed_in_mid_run_changes_no_digit(cluster: Any, tmp_path: Path) -> None:
    small = scenes.narrow()
    folder = vitadapter_zoo.save_pretrained(small, tmp_path / "model")
    coco = scenes.write_coco(tmp_path / "coco", small, PICTURES)
    alone = vitadapter_zoo.verify(folder, coco, threads=1, run=tmp_path / "alone")
    nodes = [cluster.add_node(num_cpus=2, object_store_memory=STORE) for _ in range(2)]
    cluster.wait_for_nodes()
    ray: Any = importlib.import_module("ray")
    free: list[float] = []

    def watch(run: Run, images: Sequence[Image]) -> None:
        free.append(ray.available_resources().get("CPU", 0))
        if len(run.results) == KILLED_AT:
            cluster.remove_node(nodes[0], allow_graceful=False)

    run = tmp_path / "run"
    found = vitadapter_zoo.verify(
        folder, coco, ray=cluster.address, workers=4, threads=1, run=run, watch=watch
    )
    assert min(free[:KILLED_AT]) == 0  # of four, two on each node: all had their worker
    assert found.results == alone.results
    assert (found.box.figures, found.mask.figures) == (alone.box.figures, alone.mask.figures)
    assert (run / PREDICTIONS).read_bytes().count(b"\n") == PICTURES


def test_no_cluster_and_no_room_are_one_error(cluster: Any, tmp_path: Path) -> None:
    small = scenes.narrow()
    folder = vitadapter_zoo.save_pretrained(small, tmp_path / "model")
    coco = scenes.write_coco(tmp_path / "coco", small, 1)
    with pytest.raises(ZooError, match=r"cannot join the Ray cluster '127\.0\.0\.1:1'"):
        vitadapter_zoo.verify(folder, coco, ray="127.0.0.1:1")
    with pytest.raises(ZooError, match="no node of the Ray cluster has CPUs"):
        vitadapter_zoo.verify(folder, coco, ray=cluster.address)
    with pytest.raises(ZooError, match="no node of the Ray cluster has a GPU"):
        vitadapter_zoo.verify(folder, coco, ray=cluster.address, device="cuda")
