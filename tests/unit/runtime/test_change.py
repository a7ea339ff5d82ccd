"""What is said before and after a runtime changes limits. Real daemons are in tests/conformance/test_update.py."""

from __future__ import annotations

import pytest

from airflow_isolation.container_spec import Resources
from airflow_isolation.errors import ContainerFailed, SpecRefused
from airflow_isolation.runtime.change import check_in_use, check_not_ended, limits_refused
from airflow_isolation.runtime.interface import Container, ContainerState, Stats

MIB = 1024 * 1024


def test_on_v2_less_memory_than_is_in_use_is_not_even_tried() -> None:
    with pytest.raises(SpecRefused, match=f"memory {16 * MIB} bytes for the container w1 is less than the {20 * MIB}"):
        check_in_use("w1", Resources(memory=16 * MIB), Stats(memory=20 * MIB))


@pytest.mark.parametrize(
    ("resources", "stats"),
    [(Resources(cpus=1), Stats(memory=MIB)), (Resources(memory=MIB), Stats(memory=MIB)), (Resources(memory=MIB), None)],
)
def test_enough_memory_or_none_named_is_tried(resources: Resources, stats: Stats | None) -> None:
    check_in_use("w1", resources, stats)


@pytest.mark.parametrize(
    "said",
    [
        "unable to set memory limit to 16 (current usage: 20, peak usage: 30)",
        'failed to write "16": write /sys/fs/cgroup/memory/airflow/w1/memory.limit_in_bytes: device or resource busy',
    ],
)
def test_the_runtimes_refusal_for_memory_in_use_is_a_refusal_of_ours(said: str) -> None:
    with (
        pytest.raises(SpecRefused, match="is less than it has in use: could not"),
        limits_refused("w1", Resources(memory=16 * MIB)),
    ):
        raise ContainerFailed(f"could not change the limits: {said}")


def test_other_words_of_the_runtime_stay_as_they_are() -> None:
    with pytest.raises(ContainerFailed, match="no such task"), limits_refused("w1", Resources(memory=16 * MIB)):
        raise ContainerFailed("no such task")
    with pytest.raises(ContainerFailed, match="unable to set memory"), limits_refused("w1", Resources(pids=20)):
        raise ContainerFailed("unable to set memory limit")


@pytest.mark.parametrize("state", [ContainerState.CREATED, ContainerState.RUNNING, ContainerState.PAUSED])
def test_what_has_not_ended_can_be_changed(state: ContainerState) -> None:
    check_not_ended(Container(id="w1", state=state, image="i:1"))
