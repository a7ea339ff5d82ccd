"""The counters of one container on literal files: a v1 host, a hybrid one, a v2 one. Directories stand in for cgroups."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from airflow_isolation.cgroups import (
    Limit,
    Usage,
    Victim,
    attribute,
    counters,
    counters_at,
    counters_of_process,
    find_mounts,
    kernel,
    usage_of,
)

if TYPE_CHECKING:
    from airflow_isolation.cgroups import Counters

MIB = 1024 * 1024
PID = 4711
PATH = "/airflow/task-1"

V1 = {
    "memory": {
        "memory.usage_in_bytes": "104857600\n",
        "memory.max_usage_in_bytes": "209715200\n",
        "memory.limit_in_bytes": "268435456\n",
        "memory.failcnt": "0\n",
        "memory.memsw.failcnt": "7\n",
        "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
    },
    "cpu,cpuacct": {
        "cpuacct.usage": "3500000000\n",
        "cpuacct.stat": "user 300\nsystem 50\n",
        "cpu.stat": "nr_periods 10\nnr_throttled 4\nthrottled_time 250000000\n",
        "cpu.cfs_quota_us": "150000\n",
        "cpu.cfs_period_us": "100000\n",
    },
    "pids": {"pids.current": "3\n", "pids.max": "512\n", "pids.events": "max 0\n"},
    "blkio": {"blkio.throttle.io_service_bytes_recursive": "8:0 Read 4096\n8:0 Write 8192\n8:0 Sync 9\nTotal 12288\n"},
}
V2 = {
    "cpu.stat": "usage_usec 3500000\nuser_usec 3000000\nsystem_usec 500000\nnr_periods 10\nnr_throttled 4\nthrottled_usec 250000\n",
    "memory.current": "104857600\n",
    "memory.peak": "209715200\n",
    "memory.max": "268435456\n",
    "memory.high": "max\n",
    "memory.events": "low 0\nhigh 0\nmax 9\noom 7\noom_kill 2\noom_group_kill 0\n",
    "pids.current": "3\n",
    "pids.peak": "9\n",
    "pids.max": "512\n",
    "io.stat": "8:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n",
}


class Host:
    """A proc and mounts of cgroups below a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.proc = root / "proc"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / str(PID)).mkdir()
        self._mounts: list[str] = []
        self._memberships: list[str] = []

    def add(self, controllers: str, path: str, files: dict[str, str], *, directory: str | None = None) -> None:
        """One hierarchy, in which the process is at ``path``; of v2 when ``controllers`` is empty."""
        mount = self.root / (controllers or "unified")
        cgroup = mount / (path if directory is None else directory).strip("/")
        cgroup.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (cgroup / name).write_text(content)
        for each in (cgroup, *cgroup.parents):
            if each.is_relative_to(mount):
                (each / "cgroup.procs").write_text("")
        kind, options = ("cgroup", f"rw,{controllers}") if controllers else ("cgroup2", "rw")
        number = len(self._mounts) + 1
        self._mounts.append(f"{30 + number} 25 0:{number} / {mount} rw,relatime shared:1 - {kind} {kind} {options}")
        self._memberships.append(f"{number if controllers else 0}:{controllers}:{path}")

    def counters(self) -> Counters:
        self.write()
        return counters_of_process(PID, proc=self.proc)

    def write(self) -> None:
        (self.proc / "self/mountinfo").write_text("\n".join(self._mounts) + "\n")
        (self.proc / str(PID) / "cgroup").write_text("\n".join(self._memberships) + "\n")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def add_v1(host: Host) -> None:
    for controllers, files in V1.items():
        host.add(controllers, PATH, files)


EVERYTHING = Usage(
    wall=12,
    cpu=3.5,
    cpu_user=3,
    cpu_system=0.5,
    cpu_throttled=0.25,
    memory_peak=200 * MIB,
    memory_limit=256 * MIB,
    oom_kills=2,
    pids_peak=9,
    pids_limit=512,
    bytes_read=4096,
    bytes_written=8192,
)


def used(counters: Counters) -> dict[str, float | int | None]:
    now = counters.read()
    assert now is not None
    usage = usage_of(now, wall=12)
    return {name: getattr(usage, name) for name in Usage.__dataclass_fields__}


def everything(**changes: int | None) -> dict[str, float | int | None]:
    return {name: getattr(EVERYTHING, name) for name in Usage.__dataclass_fields__} | changes


def test_v1_tells_all_but_the_peak_of_processes(host: Host) -> None:
    add_v1(host)
    with host.counters() as counters:
        assert used(counters) == everything(pids_peak=None)
        assert counters.oom_kills() == 2
        assert counters.name == "task-1"


def test_on_a_hybrid_host_v1_is_asked(host: Host) -> None:
    add_v1(host)
    host.add("", "/", {"cpu.stat": "usage_usec 99000000\n"})
    with host.counters() as counters:
        assert used(counters) == everything(pids_peak=None)


def test_v2_tells_all(host: Host) -> None:
    host.add("", PATH, V2)
    with host.counters() as counters:
        assert used(counters) == everything()
        assert counters.oom_kills() == 2


def test_in_a_directory_of_ours_that_one_is_read_and_not_the_runtimes(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "is_cgroup2", lambda _: True)
    host.add("", "/airflow/task_execution/task-1/container", V2, directory="/airflow/task_execution/task-1")
    with host.counters() as counters:
        assert used(counters) == everything()
        assert counters.name == "task-1"
        sample = counters.memory_sample()
    assert sample is not None
    assert [(level.limit.value, level.name) for level in sample.levels] == [
        ("purpose budget", "airflow/task_execution"),
        ("budget of all workloads", "airflow"),
    ]


def test_a_sample_of_v1_knows_that_the_limit_of_memory_and_swap_was_reached(host: Host) -> None:
    add_v1(host)
    with host.counters() as counters:
        sample = counters.memory_sample()
    assert sample is not None
    assert (sample.events.oom, sample.events.oom_kill, sample.peak, sample.limit) == (7, 2, 200 * MIB, 256 * MIB)
    assert not sample.oom_group


def test_where_v1_counts_no_failures_the_peak_tells_that_the_limit_was_reached(host: Host) -> None:
    nothing = {"memory.failcnt": "0\n", "memory.memsw.failcnt": "0\n"}
    host.add("memory", PATH, {**V1["memory"], **nothing, "memory.max_usage_in_bytes": "268435456\n"})
    with host.counters() as counters:
        sample = counters.memory_sample()
    assert sample is not None
    assert sample.events.oom == 1


def test_without_a_limit_v1_names_none(host: Host) -> None:
    host.add("memory", PATH, {**V1["memory"], "memory.limit_in_bytes": "9223372036854771712\n"})
    host.add("cpu,cpuacct", PATH, {**V1["cpu,cpuacct"], "cpu.cfs_quota_us": "-1\n"})
    with host.counters() as counters:
        now = counters.read()
    assert now is not None
    assert now.memory is not None
    assert (now.memory.limit, now.cpu.limit, now.pids, now.io) == (None, None, None, None)


def test_disks_that_v1_does_not_count_are_not_taken_for_nothing_read(host: Host) -> None:
    add_v1(host)
    host.add("blkio", PATH, {"blkio.throttle.io_service_bytes_recursive": "Total 0\n"})
    with host.counters() as counters:
        assert used(counters) == everything(pids_peak=None, bytes_read=None, bytes_written=None)


def test_what_an_old_kernel_does_not_count_is_not_known(host: Host) -> None:
    host.add("memory", PATH, {**V1["memory"], "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\n"})
    with host.counters() as counters:
        assert counters.oom_kills() is None


@pytest.mark.parametrize("version", [1, 2])
def test_what_has_been_removed_is_none(host: Host, version: int) -> None:
    if version == 1:
        add_v1(host)
    else:
        host.add("", PATH, V2)
    with host.counters() as counters:
        for mount in host.root.iterdir():
            if mount != host.proc:
                shutil.rmtree(mount)
        assert (counters.read(), counters.oom_kills(), counters.memory_sample()) == (None, None, None)


@pytest.mark.parametrize(
    ("limit", "whose"),
    [("/systemd.slice/docker-1.scope", Limit.OWN), ("/systemd.slice", Limit.OUTER), (None, Limit.HOST)],
)
def test_of_a_scope_that_is_gone_the_kernels_log_tells_who_was_killed(
    host: Host, monkeypatch: pytest.MonkeyPatch, limit: str | None, whose: Limit
) -> None:
    path = "/systemd.slice/docker-1.scope"
    host.add("", path, {**V2, "memory.events": "low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\noom_group_kill 0\n"})
    victim = Victim(name="python", pid=7, cgroup=path, limit=limit)
    monkeypatch.setattr(counters, "read_victims", lambda name: (victim,) if name == "docker-1.scope" else ())
    with host.counters() as found:
        before = found.memory_sample()
        shutil.rmtree(host.root / "unified/systemd.slice")
        after = found.memory_sample()
    assert before is not None
    assert after is not None
    told = attribute(before, after, killed=True, victims=(victim,))
    assert told is not None
    assert (told.fatal, told.limit, told.kills, told.peak, told.size) == (True, whose, 1, None, 256 * MIB)


@pytest.mark.parametrize("content", ["garbage", "", "-1\n"])
def test_nonsense_is_none(host: Host, content: str) -> None:
    host.add("memory", PATH, dict.fromkeys(V1["memory"], content))
    with host.counters() as counters:
        assert (counters.read(), counters.oom_kills(), counters.memory_sample()) == (None, None, None)


@pytest.mark.parametrize("path", ["/", "/../../elsewhere", "/gone"])
def test_a_cgroup_that_can_not_be_seen_has_no_counters(host: Host, path: str) -> None:
    host.add("memory", path, V1["memory"], directory="/airflow/task-1")
    with host.counters() as counters:
        assert not counters
        assert (counters.read(), counters.name) == (None, "")


def test_a_process_that_is_gone_has_no_counters() -> None:
    with counters_of_process(2**22 + 1) as counters:
        assert not counters


def test_by_its_path_a_container_is_found_without_a_process(host: Host) -> None:
    add_v1(host)
    host.write()
    with counters_at(PATH, find_mounts(host.proc)) as counters:
        assert used(counters) == everything(pids_peak=None)


def test_this_host_tells_of_this_process_whatever_cgroup_it_has() -> None:
    with counters_of_process(os.getpid()) as counters:
        count = counters.oom_kills()
        assert count is None or count >= 0


def test_a_mount_of_a_part_shows_what_is_below_it(host: Host) -> None:
    add_v1(host)
    host.write()
    mountinfo = host.proc / "self/mountinfo"
    mountinfo.write_text(mountinfo.read_text().replace(" / ", " /pod/7 "))
    memberships = host.proc / str(PID) / "cgroup"
    memberships.write_text(memberships.read_text().replace(PATH, f"/pod/7{PATH}"))
    with counters_of_process(PID, proc=host.proc) as counters:
        assert used(counters) == everything(pids_peak=None)


def test_descriptors_are_released(host: Host) -> None:
    add_v1(host)
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    counters = host.counters()
    assert len(list(descriptors.iterdir())) > before
    counters.close()
    counters.close()
    assert len(list(descriptors.iterdir())) == before
