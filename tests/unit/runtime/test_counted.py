"""Where the cgroups of a daemon's containers are: likely paths, and paths learned from a process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from airflow_isolation.cgroups.counters import CgroupMounts, Mounted
from airflow_isolation.runtime import counted
from airflow_isolation.runtime.counted import CgroupFiles

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A v1 host whose hierarchies are all one directory."""
    mounts = CgroupMounts({name: Mounted(tmp_path, "/") for name in ("memory", "cpuacct", "pids")})
    monkeypatch.setattr(CgroupFiles, "_mounts", mounts)
    return tmp_path


def make(host: Path, path: str, *, pids: int = 1) -> None:
    (host / path).mkdir(parents=True)
    files = {"memory.usage_in_bytes": 4096, "cpuacct.usage": 10**9, "pids.current": pids}
    for name, value in {**files, "cgroup.procs": ""}.items():
        (host / path / name).write_text(f"{value}\n")


def nobody(id: str) -> int:
    raise AssertionError(f"{id} was asked for")


def test_what_is_where_it_is_likely_needs_no_process(host: Path) -> None:
    make(host, "docker/abc")
    found, unknown = CgroupFiles("/docker/{}").read({"task-1": "abc"}, nobody)
    assert (found["task-1"].memory, found["task-1"].cpu_seconds, unknown) == (4096, 1.0, frozenset())


def test_what_has_ended_is_left_out_and_not_asked_for(host: Path) -> None:
    make(host, "airflow/task-1", pids=0)
    assert CgroupFiles("/airflow/{}").read({"task-1": "task-1"}, nobody) == ({}, frozenset())


def test_one_process_tells_where_all_are(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for number in range(5):
        make(host, f"of-ours/task-{number}")
    monkeypatch.setattr(counted, "paths_of_process", lambda pid: {"memory": f"/of-ours/task-{pid}"})
    files = CgroupFiles("/airflow/{}")

    def pid_of(id: str) -> int:
        asked.append(id)
        return int(id.rpartition("-")[2])

    ids = {f"task-{number}": f"task-{number}" for number in range(5)}
    for _ in range(2):
        found, unknown = files.read(ids, pid_of)
        assert (set(found), unknown) == (set(ids), frozenset())
    assert asked == ["task-0"]


def test_what_can_not_be_seen_is_for_the_daemon(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counted, "paths_of_process", lambda _: {})
    ids = {f"task-{number}": f"task-{number}" for number in range(5)}
    assert CgroupFiles("/airflow/{}").read(ids, lambda _: 1) == ({}, frozenset(ids))


def test_a_path_with_braces_is_not_a_pattern(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counted, "paths_of_process", lambda _: {"memory": "/{odd}/task-1"})
    assert CgroupFiles("/airflow/{}").read({"task-1": "task-1"}, lambda _: 1) == ({}, frozenset({"task-1"}))
