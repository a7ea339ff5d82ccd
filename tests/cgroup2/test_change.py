"""Limits that change while a workload runs: what is written, what is refused, and that a refusal leaves nothing behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.cgroup2.inside import MIB, occupied, until, use_and_stay

from airflow_isolation.cgroups import (
    MAX,
    Cpu,
    Limits,
    Memory,
    Pids,
    ValueRefused,
    change_limits,
    change_of,
    limits_of,
    make_workload,
    read_limits,
)
from airflow_isolation.container_spec import Resources

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airflow_isolation.cgroups import Tree, Workload

BEFORE = Resources(cpus=1, memory=128 * MIB, pids=50, memory_request=64 * MIB)


@pytest.fixture
def workload(tree: Tree) -> Iterator[Workload]:
    workload = make_workload(tree, "task_execution", "w1", limits_of(BEFORE))
    yield workload
    workload.remove()


def change(workload: Workload, resources: Resources) -> None:
    change_limits(workload.cgroup, change_of(resources, read_limits(workload.cgroup)))


def test_only_what_is_named_changes_and_memory_high_follows(workload: Workload) -> None:
    was = read_limits(workload.cgroup)
    assert was.memory == Memory(
        max=128 * MIB, high=(64 + 64 * 9 // 10) * MIB + 629145 // 4096 * 4096, low=64 * MIB, swap=0
    )
    change(workload, Resources(memory=256 * MIB, cpu_weight=50))
    now = read_limits(workload.cgroup)
    assert (now.cpu, now.pids) == (Cpu(cpus=1, weight=50), Pids(max=50))
    assert (now.memory.max, now.memory.low, now.memory.swap) == (256 * MIB, 64 * MIB, 0)
    assert now.memory.high == (64 * MIB + 192 * MIB * 9 // 10) // 4096 * 4096


def test_a_memory_high_that_was_set_stays_and_one_that_is_given_holds(workload: Workload) -> None:
    change(workload, Resources(memory_high=100 * MIB))
    change(workload, Resources(memory=256 * MIB))
    assert read_limits(workload.cgroup).memory.high == 100 * MIB
    with pytest.raises(ValueRefused, match=f"memory_high is {100 * MIB} bytes, and memory only {80 * MIB}"):
        change(workload, Resources(memory=80 * MIB))
    change(workload, Resources(memory=80 * MIB, memory_high=70 * MIB))
    assert read_limits(workload.cgroup).memory.max == 80 * MIB


def test_a_workload_without_limits_gets_some(tree: Tree) -> None:
    workload = make_workload(tree, "task_execution", "w1")
    assert read_limits(workload.cgroup).memory.max == MAX
    change(workload, Resources(cpus=0.5, memory=64 * MIB, pids=20))
    now = read_limits(workload.cgroup)
    assert (now.cpu.cpus, now.memory.max, now.pids.max) == (0.5, 64 * MIB, 20)
    workload.remove()


def test_when_one_is_refused_the_others_are_as_before(workload: Workload) -> None:
    was = read_limits(workload.cgroup)
    with occupied(workload.cgroup.path, use_and_stay(60)):
        until(lambda: int((workload.cgroup.path / "memory.current").read_text()) > 60 * MIB)
        with pytest.raises(ValueRefused, match=r"memory .* is less than the .* bytes that .* has in use"):
            change_limits(workload.cgroup, Limits(cpu=Cpu(cpus=2), memory=Memory(max=16 * MIB, low=0, high=MAX)))
        assert read_limits(workload.cgroup) == was
