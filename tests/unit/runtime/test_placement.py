"""Where a container's cgroup is planned to be, on hosts of all kinds. Real cgroups are in tests/cgroup2."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from airflow_isolation.cgroups import Hierarchy, Memory, ValueRefused
from airflow_isolation.container_spec import ContainerSpec, DeviceRates, Resources
from airflow_isolation.errors import SpecRefused
from airflow_isolation.runtime import placement
from airflow_isolation.runtime.labels import PURPOSE
from airflow_isolation.runtime.placement import Placements

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1024**3
SPEC = ContainerSpec(image="i:1", argv=("x",), labels={PURPOSE: "task"}, resources=Resources(memory=GIB, cpus=2))
ALL = frozenset({"cpu", "memory", "pids", "io"})


def placements(monkeypatch: pytest.MonkeyPatch, hierarchy: Hierarchy) -> Placements:
    monkeypatch.setattr(placement, "find_hierarchy", lambda _: hierarchy)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    return Placements(str(hierarchy.mount), hierarchy.mount / "state")


@pytest.mark.parametrize("kind", ["legacy", "hybrid", "none"])
def test_without_cgroup_v2_limits_go_through_the_runtime(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    hierarchy = Hierarchy(kind=kind, mount=tmp_path)  # type: ignore[arg-type]
    found = placements(monkeypatch, hierarchy).plan("w1", SPEC, "airflow")
    assert (found.cgroups_path, found.resources, found.tree) == ("/airflow/w1", SPEC.resources, None)


@pytest.mark.parametrize(
    ("resources", "budget", "named"),
    [
        (Resources(memory=GIB, memory_high=GIB), Resources(), "memory_high can't be had.*are v1"),
        (Resources(memory_request=GIB, io_weight=100), Resources(), "memory_request, io_weight can't be had"),
        (Resources(io_max=(DeviceRates(device="8:0", wbps=1),)), Resources(), "io_max can't be had"),
        (Resources(), Resources(memory=GIB), "budget_memory can't be had.*unified_cgroup_hierarchy=1"),
    ],
)
def test_without_cgroup_v2_what_needs_it_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, resources: Resources, budget: Resources, named: str
) -> None:
    places = placements(monkeypatch, Hierarchy(kind="legacy", mount=tmp_path))
    with pytest.raises(SpecRefused, match=named):
        places.plan("w1", replace(SPEC, resources=resources, budget=budget), "airflow")


@pytest.mark.parametrize("kind", ["legacy", "hybrid"])
def test_what_v1_has_too_goes_through_the_runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    places = placements(monkeypatch, Hierarchy(kind=kind, mount=tmp_path))  # type: ignore[arg-type]
    resources = Resources(memory=GIB, cpu_weight=50, cpuset="0", memory_swap=0)
    assert places.plan("w1", replace(SPEC, resources=resources), "airflow").resources == resources


def test_where_v2_is_not_in_our_hands_a_weight_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runtimes translate it from v1's, and not all in the same way."""
    places = placements(monkeypatch, Hierarchy(kind="unified", mount=tmp_path, controllers=ALL))
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(SpecRefused, match=r"cpu_weight can't be had.*the worker's user may not make cgroups"):
        places.plan("w1", replace(SPEC, resources=Resources(cpu_weight=50, cpuset="0")), "airflow")


@pytest.mark.parametrize(("purpose", "level"), [("task", "task_execution"), ("parse", "dag_parsing"), ("", "others")])
def test_with_cgroup_v2_limits_are_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, purpose: str, level: str
) -> None:
    places = placements(monkeypatch, Hierarchy(kind="unified", mount=tmp_path, controllers=ALL))
    spec = replace(SPEC, labels={PURPOSE: purpose}, budget=Resources(memory=4 * GIB))
    found = places.plan("w1", spec, "airflow")
    assert found.cgroups_path == f"/airflow/{level}/w1/container"
    assert found.resources == Resources()
    assert found.limits.memory == Memory(max=GIB, swap=0, oom_group=True)
    assert found.budget.memory == Memory(max=4 * GIB)


def test_a_budget_that_is_taken_away_is_taken_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    places = placements(monkeypatch, Hierarchy(kind="unified", mount=tmp_path, controllers=ALL))
    found = places.plan("w1", replace(SPEC, budget=Resources(pids=100)), "airflow")
    assert (found.budget.memory.max, found.budget.cpu.cpus, found.budget.pids.max) == ("max", "max", 100)


def test_memory_high_is_kubelets_unless_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    places = placements(monkeypatch, Hierarchy(kind="unified", mount=tmp_path, controllers=ALL))
    resources = Resources(memory=1000 * 4096 * 4, memory_request=500 * 4096 * 4)
    formula = places.plan("w1", replace(SPEC, resources=resources), "airflow")
    given = places.plan("w1", replace(SPEC, resources=replace(resources, memory_high=4096 * 2000)), "airflow")
    assert (formula.limits.memory.high, given.limits.memory.high) == (950 * 4096 * 4, 4096 * 2000)


def test_a_limit_that_can_not_be_is_refused_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    places = placements(monkeypatch, Hierarchy(kind="unified", mount=tmp_path, controllers=ALL))
    with pytest.raises(SpecRefused, match="memory is 4 bytes") as refused:
        places.plan("w1", replace(SPEC, resources=Resources(memory=4)), "airflow")
    assert isinstance(refused.value.__cause__, ValueRefused)
    with pytest.raises(SpecRefused, match="does not have the controller cpuset"):
        places.plan("w1", replace(SPEC, resources=Resources(cpuset="0")), "airflow")


def test_in_a_cgroup_namespace_of_the_workers_own_the_runtime_does_it_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is the root to the worker is not the root to the daemon."""
    (tmp_path / "cgroup.type").touch()
    places = placements(monkeypatch, Hierarchy(kind="unified", mount=tmp_path, controllers=ALL))
    assert places.plan("w1", SPEC, "airflow").tree is None


@pytest.mark.parametrize(("delegated", "ours"), [("", False), ("user.slice/user@1.service", True)])
def test_a_user_makes_cgroups_only_where_they_are_delegated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, delegated: str, ours: bool
) -> None:
    hierarchy = Hierarchy(kind="unified", mount=tmp_path, controllers=ALL, delegated=delegated)
    places = placements(monkeypatch, hierarchy)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert (places.plan("w1", SPEC, "airflow").tree is not None) is ours


def test_removing_a_container_that_the_runtime_placed_touches_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    places = placements(monkeypatch, Hierarchy(kind="legacy", mount=tmp_path))
    for path in ("", "/airflow/w1", "/airflow/container", "/airflow/task_execution/other/container"):
        places.remove("w1", path, 1)
