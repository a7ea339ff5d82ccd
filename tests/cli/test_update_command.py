"""``airflow containers update`` against a real containerd."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from airflow_isolation.runtime import labels

if TYPE_CHECKING:
    from tests.cli.conftest import Airflow, MakeContainer

    from airflow_isolation.runtime.containerd import ContainerdRuntime

pytestmark = pytest.mark.root

THIS_WORKER = labels.Owner.this_process()
MIB = 1024 * 1024


def test_limits_of_a_running_container_change(
    airflow: Airflow, make_container: MakeContainer, runtime: ContainerdRuntime
) -> None:
    container = make_container(THIS_WORKER, started=True)
    done = airflow("containers", "update", container.id[:-3], "--memory", "300Mi", "--pids", "40", "--output", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "backend": "containerd",
        "container": container.id,
        "changed": {"memory": 300 * MIB, "pids": 40},
    }
    stats = runtime.stats([container.id])[container.id]
    assert (stats.memory_limit, stats.pids_limit) == (300 * MIB, 40)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "No limit is given"),
        (("--memory", "4"), 2, "--memory: "),
        (("--memory", "64Gi"), 1, "--memory: 64 GiB is more than [container_runtime_policy] max_memory allows, 8 GiB"),
        (("--io-weight", "5"), 1, "io_weight can't be had"),
    ],
)
def test_what_can_not_be_is_said_and_changes_nothing(
    *,
    airflow: Airflow,
    make_container: MakeContainer,
    runtime: ContainerdRuntime,
    arguments: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    container = make_container(THIS_WORKER, started=True)
    policy = {"AIRFLOW__CONTAINER_RUNTIME_POLICY__MAX_MEMORY": "8Gi"}
    done = airflow("containers", "update", container.id, *arguments, **policy)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert runtime.stats([container.id])[container.id].memory_limit is None


def test_of_a_container_that_is_not_there_it_is_said(airflow: Airflow) -> None:
    done = airflow("containers", "update", "nope", "--memory", "1Gi")
    assert done.returncode == 1
    assert "There is no container whose id is, or begins with, 'nope'" in done.stderr
