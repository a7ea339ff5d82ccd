"""Where a container of Docker's is planned to be, by dockerd's cgroup driver. Real ones are in tests/cgroup2."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from airflow_isolation.cgroups import Hierarchy
from airflow_isolation.container_spec import ContainerSpec, Resources
from airflow_isolation.errors import SpecRefused
from airflow_isolation.oci import HostFacts
from airflow_isolation.runtime import placement
from airflow_isolation.runtime.docker import DockerRuntime
from airflow_isolation.runtime.labels import PURPOSE

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1024**3
SPEC = ContainerSpec(image="i:1", argv=("x",), labels={PURPOSE: "task"}, resources=Resources(memory=GIB, cpus=2))
ALL = frozenset({"cpu", "memory", "pids", "io"})


@pytest.fixture
def unified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hierarchy = Hierarchy(kind="unified", mount=tmp_path, controllers=ALL)
    monkeypatch.setattr(placement, "find_hierarchy", lambda _: hierarchy)
    monkeypatch.setattr("os.geteuid", lambda: 0)


def docker(monkeypatch: pytest.MonkeyPatch, driver: str, version: str) -> DockerRuntime:
    monkeypatch.setattr(DockerRuntime, "_cgroup_driver", (driver, version))
    monkeypatch.setattr(DockerRuntime, "_host", HostFacts(cgroup_v2=version == "2"))
    return DockerRuntime()


@pytest.mark.usefixtures("unified")
@pytest.mark.parametrize(("parent", "root"), [("", "airflow"), ("/team/x", "team/x")])
def test_with_cgroupfs_on_v2_it_is_below_a_directory_of_ours(
    monkeypatch: pytest.MonkeyPatch, parent: str, root: str
) -> None:
    runtime = docker(monkeypatch, "cgroupfs", "2")
    placed, words = runtime._placed("w1", replace(SPEC, cgroup_parent=parent))
    assert words == f"/{root}/task_execution/w1"
    assert (placed.limits.memory.max, placed.resources) == (GIB, Resources())


@pytest.mark.usefixtures("unified")
def test_a_user_who_may_not_make_cgroups_leaves_them_to_dockerd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    placed, words = docker(monkeypatch, "cgroupfs", "2")._placed("w1", replace(SPEC, cgroup_parent="team"))
    assert (placed.tree, placed.resources, words) == (None, SPEC.resources, "/team")


@pytest.mark.parametrize(
    ("parent", "words"), [("", ""), ("airflow/tasks", "airflow-tasks.slice"), ("a.slice", "a.slice")]
)
@pytest.mark.parametrize("version", ["1", "2"])
def test_with_systemd_the_parent_is_a_slice(
    monkeypatch: pytest.MonkeyPatch, version: str, parent: str, words: str
) -> None:
    placed, found = docker(monkeypatch, "systemd", version)._placed("w1", replace(SPEC, cgroup_parent=parent))
    assert (placed.tree, placed.resources, found) == (None, SPEC.resources, words)


def test_a_parent_that_can_not_be_a_slice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecRefused, match=r"cgroup_parent: 'b\.slice/a-b\.slice' is no slice's path"):
        docker(monkeypatch, "systemd", "2")._placed("w1", replace(SPEC, cgroup_parent="b.slice/a-b.slice"))


@pytest.mark.parametrize(
    ("driver", "version", "words"),
    [
        (
            "systemd",
            "2",
            r"memory_high, budget_pids can't be had.*dockerd's cgroup driver is systemd.*native\.cgroupdriver",
        ),
        ("none", "2", "dockerd's cgroup driver is none"),
        ("cgroupfs", "1", r"dockerd uses cgroup v1.*unified_cgroup_hierarchy=1"),
    ],
)
def test_what_needs_a_directory_of_ours_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, driver: str, version: str, words: str
) -> None:
    spec = replace(SPEC, resources=Resources(memory_high=GIB), budget=Resources(pids=100))
    with pytest.raises(SpecRefused) as refused:
        docker(monkeypatch, driver, version)._placed("w1", spec)
    assert re.search(words, str(refused.value))


@pytest.mark.parametrize(("version", "goes"), [("1", True), ("2", False)])
def test_a_weight_goes_through_dockerd_on_v1_alone(
    monkeypatch: pytest.MonkeyPatch, version: str, *, goes: bool
) -> None:
    spec = replace(SPEC, resources=Resources(cpu_weight=50, cpuset="0"))
    runtime = docker(monkeypatch, "systemd", version)
    if goes:
        assert runtime._placed("w1", spec)[0].resources == spec.resources
    else:
        with pytest.raises(SpecRefused, match="cpu_weight can't be had"):
            runtime._placed("w1", spec)
