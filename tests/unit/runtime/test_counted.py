"""Where the cgroups of a daemon's containers are: likely paths, and paths learned from a process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from airflow_isolation.cgroups import CpuStat, MemoryStat, PidsStat, Pressure, PressureStat, Stall, Statistics
from airflow_isolation.cgroups.mounted import CgroupMounts, Mounted
from airflow_isolation.runtime import counted
from airflow_isolation.runtime.counted import CgroupFiles
from airflow_isolation.runtime.interface import Stats

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


def test_use_is_what_the_full_counters_say(host: Path) -> None:
    make(host, "airflow/task-1", pids=3)
    make(host, "airflow/task-ended", pids=0)
    names = {id: id for id in ("task-1", "task-ended", "task-elsewhere")}
    files = CgroupFiles("/airflow/{}")
    full = files.read(names, lambda _: 0)[0]
    used = files.read_use(names)
    assert set(used) == set(full) == {"task-1"}
    assert used["task-1"] == Stats(cpu_seconds=1.0, memory=4096, pids=3)
    assert (full["task-1"].cpu_seconds, full["task-1"].memory, full["task-1"].pids) == (1.0, 4096, 3)


def test_what_can_not_be_seen_is_for_the_daemon(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counted, "paths_of_process", lambda _: {})
    ids = {f"task-{number}": f"task-{number}" for number in range(5)}
    assert CgroupFiles("/airflow/{}").read(ids, lambda _: 1) == ({}, frozenset(ids))


def test_a_path_with_braces_is_not_a_pattern(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counted, "paths_of_process", lambda _: {"memory": "/{odd}/task-1"})
    assert CgroupFiles("/airflow/{}").read({"task-1": "task-1"}, lambda _: 1) == ({}, frozenset({"task-1"}))


def test_pressure_is_that_of_the_last_ten_seconds_and_none_where_it_is_not_measured() -> None:
    pressed = Pressure(some=Stall(avg10=3.5, avg60=9, total=8), full=Stall(avg10=1))
    now = Statistics(
        cpu=CpuStat(usage=1, user=1, system=0),
        memory=MemoryStat(current=4096),
        pids=PidsStat(current=1),
        pressure=PressureStat(memory=pressed),
    )
    stats = counted.stats_of(now)
    assert stats is not None
    assert (stats.cpu_pressure, stats.memory_pressure, stats.io_pressure) == (None, 3.5, None)
