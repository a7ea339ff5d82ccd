"""No container outlives its worker."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from tests.processes import wait_until

from airflow_isolation.bridge.prune import prune
from airflow_isolation.runtime import labels
from airflow_isolation.runtime.connect import connect
from airflow_isolation.runtime.interface import ContainerState

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import Daemon
    from tests.end_to_end.airflow_processes import Airflow

    from airflow_isolation.runtime.interface import ContainerRuntime

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def runtime(backend: str, daemon: Daemon, state_dir: Path, quiet: None) -> Iterator[ContainerRuntime]:
    with connect(backend, socket_path=str(daemon.socket), namespace="airflow", state_dir=state_dir) as runtime:
        yield runtime


@pytest.mark.parametrize("dag_id", ["patient", "heeds_nothing"])
def test_a_container_ends_by_itself_when_its_worker_is_killed(
    airflow: Airflow, runtime: ContainerRuntime, state_dir: Path, dag_id: str
) -> None:
    airflow.trigger(dag_id, "orphaned", name=f"orphan-{dag_id}")
    airflow.wait_for_file(f"orphan-{dag_id}.running")
    (container,) = runtime.list({labels.DAG_ID: dag_id, labels.RUN_ID: "orphaned"})
    owner = labels.Owner.parse(container.labels[labels.OWNER])
    assert owner is not None
    assert owner.pid != airflow.processes["scheduler"].pid
    with runtime.wait(container.id) as pending:
        pruned = prune(runtime, state_dir=state_dir)
        # A zygote, which has no owner, may just have ended for want of tasks.
        robbed = [left for left in pruned.containers if left.labels[labels.PURPOSE] != "zygote"]
        assert robbed == [], "a living owner is not robbed"
        os.kill(owner.pid, signal.SIGKILL)
        pending.result(30)
    wait_until(lambda: runtime.get(container.id).state is ContainerState.STOPPED, 10, "the end of the container")
    wait_until(owner.is_gone, 15, "the scheduler to collect its dead worker")

    # A directory counts as new for a minute, in which its worker may not hold it yet. A spare's lies elsewhere.
    own = state_dir / "workloads" / container.id
    if own.exists():
        os.utime(own, (0, 0))
    pruned = prune(runtime, state_dir=state_dir)
    # With it goes what the worker had made ready for its next task, and a zygote that has ended by itself.
    assert container.id in [left.id for left in pruned.containers]
    assert {left.labels[labels.PURPOSE] for left in pruned.containers if left.id != container.id} <= {"spare", "zygote"}
    assert not [path for path in state_dir.rglob("*") if container.id in path.name]
    run = airflow.finished(dag_id, "orphaned")
    assert set(run.states.values()) == {"failed"}
