"""Where a container of Docker's is planned to be, by dockerd's cgroup driver. Real ones are in tests/cgroup2."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from airflow_isolation.cgroups import NO_LIMITS, Hierarchy, systemd
from airflow_isolation.container_spec import ContainerSpec, Resources
from airflow_isolation.errors import ContainerFailed, SpecRefused
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
def test_with_systemd_on_v1_the_parent_is_a_slice(monkeypatch: pytest.MonkeyPatch, parent: str, words: str) -> None:
    placed, found = docker(monkeypatch, "systemd", "1")._placed("w1", replace(SPEC, cgroup_parent=parent))
    assert (placed.tree, placed.resources, found) == (None, SPEC.resources, words)


@pytest.mark.parametrize(
    ("parent", "words"),
    [
        ("", "airflow-task_execution.slice"),
        ("airflow/tasks", "airflow-tasks-task_execution.slice"),
        ("a.slice", "a-task_execution.slice"),
    ],
)
def test_with_systemd_on_v2_the_purpose_has_a_slice_below_the_parents(
    monkeypatch: pytest.MonkeyPatch, parent: str, words: str
) -> None:
    placed, found = docker(monkeypatch, "systemd", "2")._placed("w1", replace(SPEC, cgroup_parent=parent))
    assert (placed.tree, placed.resources, placed.slice, found) == (None, SPEC.resources, words, words)


@pytest.mark.parametrize(("uid", "booted"), [(1000, True), (0, False)])
def test_a_budget_is_refused_by_name_where_systemd_can_not_be_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uid: int, *, booted: bool
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: uid)
    monkeypatch.setattr(systemd, "BOOTED", tmp_path if booted else tmp_path / "not")
    spec = replace(SPEC, budget=Resources(memory=4 * GIB))
    with pytest.raises(SpecRefused, match=r"budget_memory can't be had.*takes orders only from the host's root"):
        docker(monkeypatch, "systemd", "2")._placed("w1", spec)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo no such thing as $4 $5 >&2; exit 1", r"no such thing as airflow-task_execution\.slice CPUQuota="),
        ("exit 0", r"systemd was told.*airflow\.slice/airflow-task_execution\.slice does not hold them"),
        ("", "can't be set: systemctl"),
    ],
)
def test_a_budget_that_systemd_does_not_hold_fails_the_create(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, words: str
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(systemd, "BOOTED", tmp_path)
    monkeypatch.setattr(systemd, "limits_of_slice", lambda *_: NO_LIMITS)
    # A fake that fails, or that agrees and does nothing, or none at all.
    monkeypatch.setenv("PATH", str(tmp_path))
    if script:
        (tmp_path / "systemctl").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "systemctl").chmod(0o755)
    runtime = docker(monkeypatch, "systemd", "2")
    placed, _ = runtime._placed("w1", replace(SPEC, budget=Resources(memory=4 * GIB)))
    with pytest.raises(ContainerFailed, match=words):
        runtime._placements.make(placed)


def test_a_parent_that_can_not_be_a_slice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecRefused, match=r"cgroup_parent: 'b\.slice/a-b\.slice' is no slice's path"):
        docker(monkeypatch, "systemd", "2")._placed("w1", replace(SPEC, cgroup_parent="b.slice/a-b.slice"))


@pytest.mark.parametrize(
    ("driver", "version", "words"),
    [
        (
            "systemd",
            "2",
            r"memory_high can't be had.*dockerd's cgroup driver is systemd.*native\.cgroupdriver",
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
