"""The verdict as a pure function of counters, and its sentence; the kernel's log as literal lines.

The real kernel's counters are held by tests/cgroup2.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest

from airflow_isolation.cgroups import (
    Limit,
    MemoryEvents,
    MemorySample,
    OutOfMemory,
    Usage,
    Victim,
    attribute,
    cpu,
    io,
    memory,
    pids,
    read_victims,
    usage_of,
)
from airflow_isolation.cgroups.kernel_log import parse_victims
from airflow_isolation.cgroups.out_of_memory import MemoryLevel
from airflow_isolation.cgroups.statistics import Statistics
from airflow_isolation.cgroups.words import amount, share

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1024 * 1024
PURPOSE, ROOT, UNIT = "u/airflow/task_execution", "u/airflow", "u"


def sample(
    *,
    oom: int = 0,
    oom_kill: int = 0,
    group: int | None = 0,
    purpose: int = 0,
    root: int = 0,
    unit: int = 0,
    oom_group: bool = True,
) -> MemorySample:
    return MemorySample(
        events=MemoryEvents(oom=oom, oom_kill=oom_kill, oom_group_kill=group),
        levels=(
            MemoryLevel(limit=Limit.PURPOSE, name=PURPOSE, oom=purpose),
            MemoryLevel(limit=Limit.ALL_WORKLOADS, name=ROOT, oom=root),
            MemoryLevel(limit=Limit.OUTER, name=UNIT, oom=unit),
        ),
        peak=64 * MIB,
        limit=64 * MIB,
        oom_group=oom_group,
    )


def victim(limit: str | None, pid: int = 7) -> Victim:
    return Victim(name="python3", pid=pid, cgroup=f"/{PURPOSE}/w1/container", limit=limit)


def test_no_kill_no_verdict() -> None:
    # The limit was reached, and an allocation refused; but SIGKILL came from elsewhere.
    assert attribute(sample(), sample(oom=3), killed=True) is None


def test_kills_of_before_do_not_count() -> None:
    earlier = sample(oom=1, oom_kill=2, group=1)
    assert attribute(earlier, earlier, killed=True) is None


@pytest.mark.parametrize(
    ("after", "limit", "cgroup"),
    [
        (sample(oom=1, oom_kill=1, group=1), Limit.OWN, ""),
        (sample(oom_kill=1, group=1, purpose=1), Limit.PURPOSE, PURPOSE),
        (sample(oom_kill=1, group=1, root=1), Limit.ALL_WORKLOADS, ROOT),
        (sample(oom_kill=1, group=1, unit=1), Limit.OUTER, UNIT),
        (sample(oom_kill=1, group=1), Limit.HOST, ""),
        # A neighbour reached the purpose's budget too: the nearest limit is the likeliest.
        (sample(oom=1, oom_kill=1, group=1, purpose=1), Limit.OWN, ""),
    ],
)
def test_whose_limit_from_counters_alone(after: MemorySample, limit: Limit, cgroup: str) -> None:
    found = attribute(sample(), after, killed=True)
    assert found is not None
    assert (found.fatal, found.limit, found.cgroup) == (True, limit, cgroup)


@pytest.mark.parametrize(
    ("named", "limit", "cgroup"),
    [
        (f"/{PURPOSE}/w1", Limit.OWN, ""),
        (f"/{PURPOSE}/w1/container", Limit.OWN, ""),
        (f"/{PURPOSE}", Limit.PURPOSE, PURPOSE),
        (f"/outer/{PURPOSE}", Limit.PURPOSE, PURPOSE),
        (f"/{UNIT}", Limit.OUTER, UNIT),
        (None, Limit.HOST, ""),
    ],
)
def test_the_kernels_log_settles_what_counters_leave_open(named: str | None, limit: Limit, cgroup: str) -> None:
    """Everybody's limit was reached in this time, by others too."""
    found = attribute(
        sample(), sample(oom=1, oom_kill=1, group=1, purpose=5, root=5, unit=5), killed=True, victims=[victim(named)]
    )
    assert found is not None
    assert (found.limit, found.cgroup) == (limit, cgroup)


@pytest.mark.parametrize(
    ("after", "killed", "victims", "fatal"),
    [
        # The workload succeeded, or failed by itself.
        (sample(oom=1, oom_kill=1), False, [], False),
        # All died together.
        (sample(oom=1, oom_kill=2, group=1), True, [], True),
        # They would have died together, so SIGKILL came from elsewhere.
        (sample(oom=1, oom_kill=1), True, [], False),
        (sample(oom=1, oom_kill=1), True, [victim(f"/{PURPOSE}/w1", pid=7)], True),
        (sample(oom=1, oom_kill=1), True, [victim(f"/{PURPOSE}/w1", pid=8)], False),
        # Single kills: the log tells, and without it SIGKILL and a kill are taken for the same.
        (sample(oom=1, oom_kill=1, oom_group=False), True, [victim(f"/{PURPOSE}/w1", pid=7)], True),
        (sample(oom=1, oom_kill=1, oom_group=False), True, [victim(f"/{PURPOSE}/w1", pid=8)], False),
        (sample(oom=1, oom_kill=1, oom_group=False), True, [], True),
    ],
)
def test_whether_the_workload_died_of_it(after: MemorySample, killed: bool, victims: list[Victim], fatal: bool) -> None:
    found = attribute(sample(), after, killed=killed, pid=7, victims=victims)
    assert found is not None
    assert found.fatal is fatal


def test_kernels_that_count_no_group_kills() -> None:
    found = attribute(sample(group=None), sample(oom=1, oom_kill=1, group=None), killed=True)
    assert found is not None
    assert found.fatal


@pytest.mark.parametrize(
    ("verdict", "sentence"),
    [
        (
            OutOfMemory(fatal=True, limit=Limit.OWN, peak=512 * MIB, size=512 * MIB, victims=(victim(None),)),
            (
                "The kernel killed this workload because memory ran out: it reached its own limit, memory = 512 MiB; its "
                "peak was 512 MiB (100 %). Killed: python3 (process 7). Raise resources.memory."
            ),
        ),
        (
            OutOfMemory(fatal=True, limit=Limit.HOST, peak=100 * MIB),
            (
                "The kernel killed this workload because memory ran out: the host had no memory left; its peak was 100 MiB. "
                "Set memory and budget_memory so that workloads can't use up the host."
            ),
        ),
        (
            OutOfMemory(fatal=False, limit=Limit.PURPOSE, cgroup=PURPOSE, kills=2, size=512 * MIB),
            (
                "The kernel killed processes of this workload because memory ran out, and the workload went on: the "
                f"workloads of its purpose together reached their budget ({PURPOSE}), not its own limit of 512 MiB. Raise "
                "budget_memory, or let fewer run at the same time."
            ),
        ),
    ],
)
def test_the_sentence(verdict: OutOfMemory, sentence: str) -> None:
    assert verdict.sentence == sentence


KERNEL_LOG = [
    (
        "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,"
        "oom_memcg=/airflow/task_execution/w1,task_memcg=/airflow/task_execution/w1/container,task=my task,v2,pid=42,uid=50000"
    ),
    "Memory cgroup out of memory: Killed process 42 (my task,v2) total-vm:8kB, anon-rss:4kB, file-rss:0kB, shmem-rss:0kB",
    (
        "oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=w1,mems_allowed=0,global_oom,"
        "task_memcg=/airflow/task_execution/w1/container,task=python3,pid=43,uid=0"
    ),
    (
        "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,"
        "oom_memcg=/x,task_memcg=/x/w10,task=other,pid=44,uid=0"
    ),
    "eth0: link up",
]


def test_victims_are_read_from_the_kernels_own_summaries() -> None:
    container = "/airflow/task_execution/w1/container"
    assert list(parse_victims(KERNEL_LOG)) == [
        Victim(name="my task,v2", pid=42, cgroup=container, limit="/airflow/task_execution/w1"),
        Victim(name="python3", pid=43, cgroup=container, limit=None),
        Victim(name="other", pid=44, cgroup="/x/w10", limit="/x"),
    ]


def test_only_those_of_the_workload(tmp_path: Path) -> None:
    # A file stands in for the device: one read gives all of it, and so one record.
    log = tmp_path / "kmsg"
    log.write_text(f"6,1,2,-;{KERNEL_LOG[0]}\n")
    assert [victim.pid for victim in read_victims("w1", log)] == [42]
    assert read_victims("w10", log) == ()


def test_a_log_that_can_not_be_read_names_nobody(tmp_path: Path) -> None:
    assert read_victims("w1", tmp_path / "none") == ()


def test_the_kernels_log_has_a_backslash_escaped(tmp_path: Path) -> None:
    log = tmp_path / "kmsg"
    slices = r"/my\x5cx2dteam.slice/my\x5cx2dteam-x.slice"
    log.write_text(
        f"6,1,1,-;oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,oom_memcg={slices},"
        f"task_memcg={slices}/docker-1.scope,task=x,pid=42,uid=0\n"
    )
    (victim,) = read_victims("docker-1.scope", log)
    assert victim.limit == r"/my\x2dteam.slice/my\x2dteam-x.slice"
    assert victim.cgroup == rf"{victim.limit}/docker-1.scope"


USAGE = Usage(
    wall=12,
    cpu=3.5,
    cpu_user=3,
    cpu_system=0.5,
    cpu_throttled=1.25,
    memory_peak=256 * MIB,
    memory_limit=512 * MIB,
    oom_kills=0,
    pids_peak=7,
    pids_limit=256,
    bytes_read=3 * MIB,
    bytes_written=1536,
)


def test_usage_in_one_line() -> None:
    assert USAGE.sentence == (
        "wall 12.0 s; CPU 3.5 s (user 3.0 s, system 0.5 s, throttled 1.2 s); memory peak 256 MiB of 512 MiB (50 %); "
        "OOM kills 0; processes peak 7 of 256; read 3 MiB, wrote 1.5 KiB"
    )
    assert USAGE.memory_share == 0.5


def test_usage_leaves_out_what_is_not_known() -> None:
    usage = Usage(wall=1, cpu=1, cpu_user=1, cpu_system=0, cpu_throttled=0)
    assert usage.sentence == "wall 1.0 s; CPU 1.0 s (user 1.0 s, system 0.0 s, throttled 0.0 s)"
    assert usage.memory_share is None


def test_usage_is_numbers_for_metrics() -> None:
    assert all(isinstance(value, int | float) for value in asdict(USAGE).values())


def test_usage_of_statistics() -> None:
    events = MemoryEvents(oom_kill=0)
    statistics = Statistics(
        cpu=cpu.CpuStat(usage=3.5, user=3, system=0.5, throttled=1.25),
        memory=memory.MemoryStat(current=1, peak=256 * MIB, limit=512 * MIB, events=events),
        pids=pids.PidsStat(current=0, peak=7, limit=256),
        io=io.IoStat(bytes_read=3 * MIB, bytes_written=1536),
    )
    assert usage_of(statistics, wall=12) == USAGE


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1536, "1.5 KiB"),
        (10 * MIB, "10 MiB"),
        (5 * 2**40, "5 TiB"),
        (None, "unknown"),
    ],
)
def test_amounts_for_people(count: int | None, words: str) -> None:
    assert amount(count) == words


def test_a_share_of_nothing_is_left_out() -> None:
    assert (share(1, 2), share(1, None), share(None, 2), share(1, 0)) == (" (50 %)", "", "", "")
