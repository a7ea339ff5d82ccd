"""The counters of cgroup v1 in the form of cgroup v2's. In v1 each controller has a hierarchy of its own.

Sources: the kernel's Documentation/admin-guide/cgroup-v1, mm/memcontrol-v1.c, kernel/sched/cpuacct.c, block/blk-throttle.c.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from airflow_isolation.cgroups.cpu import CpuStat
from airflow_isolation.cgroups.directory import flat_keyed, limit_or_none
from airflow_isolation.cgroups.io import IoStat
from airflow_isolation.cgroups.memory import MemoryEvents, MemoryStat

if TYPE_CHECKING:
    from airflow_isolation.cgroups.directory import Cgroup

# v1 shows "no limit" as the largest possible number of pages; no real limit is near it.
_NO_LIMIT: Final = 2**62
# The last request, which failed, may have been for several pages at once, such as a thread's stack.
_NEAR: Final = 16 * os.sysconf("SC_PAGE_SIZE")
_TICKS: Final = os.sysconf("SC_CLK_TCK")


def memory_stat(cgroup: Cgroup) -> MemoryStat | None:
    """The memory counters now; None without their files.

    ``events.oom`` tells only that the limit was reached: v1 does not count how often reclaiming was in vain, and some
    kernels don't count at all. When the limit of memory and swap equals that of memory, the former is the one reached.

    :raises CgroupGone: the cgroup has been removed.
    """
    current = limit_or_none(cgroup.read_if_there("memory.usage_in_bytes"))
    if current is None:
        return None
    limit = limit_or_none(cgroup.read_if_there("memory.limit_in_bytes"))
    reached = sum(limit_or_none(cgroup.read_if_there(f"memory.{kind}failcnt")) or 0 for kind in ("", "memsw."))
    peak = limit_or_none(cgroup.read_if_there("memory.max_usage_in_bytes"))
    if not reached and peak is not None and limit is not None and peak > limit - _NEAR:
        reached = 1
    return MemoryStat(
        current=current,
        peak=peak,
        limit=limit if limit is not None and limit < _NO_LIMIT else None,
        events=MemoryEvents(max=reached, oom=reached, oom_kill=oom_kills(cgroup) or 0),
    )


def oom_kills(cgroup: Cgroup) -> int | None:
    """How many processes the kernel killed for memory; None before Linux 4.13, which does not count them.

    :raises CgroupGone: the cgroup has been removed.
    """
    return flat_keyed(cgroup.read_if_there("memory.oom_control") or "").get("oom_kill")


def cpu_stat(cpuacct: Cgroup, cpu: Cgroup | None) -> CpuStat | None:
    """The cpu counters of two controllers, which are often mounted together. None without the files of ``cpuacct``.

    :raises CgroupGone: the cgroup has been removed.
    """
    usage = limit_or_none(cpuacct.read_if_there("cpuacct.usage"))
    if usage is None:
        return None
    kinds = flat_keyed(cpuacct.read_if_there("cpuacct.stat") or "")
    throttling = flat_keyed(cpu.read_if_there("cpu.stat") or "") if cpu else {}
    quota = limit_or_none(cpu.read_if_there("cpu.cfs_quota_us")) if cpu else None  # -1 without a limit
    period = limit_or_none(cpu.read_if_there("cpu.cfs_period_us")) if cpu else None
    return CpuStat(
        usage=usage / 1e9,
        user=kinds.get("user", 0) / _TICKS,
        system=kinds.get("system", 0) / _TICKS,
        throttled=throttling.get("throttled_time", 0) / 1e9,
        periods=throttling.get("nr_periods", 0),
        periods_throttled=throttling.get("nr_throttled", 0),
        limit=quota / period if quota is not None and period else None,
    )


def io_stat(cgroup: Cgroup) -> IoStat | None:
    """The disk counters; None when no disk is listed: since Linux 6.10 they count only where a limit for disks was set.

    :raises CgroupGone: the cgroup has been removed.
    """
    served = cgroup.read_if_there("blkio.throttle.io_service_bytes_recursive")
    return None if served is None else parse_io(served)


def parse_io(served: str) -> IoStat | None:
    r"""Parse ``MAJOR:MINOR OPERATION BYTES`` lines; the last line is their sum.

    >>> parse_io("8:0 Read 10\n8:0 Write 20\n8:0 Sync 30\n8:16 Read 1\nTotal 31\n")
    IoStat(bytes_read=11, bytes_written=20, reads=0, writes=0)
    """
    rows = [words for line in served.splitlines() if len(words := line.split()) == 3 and words[2].isdigit()]
    if not rows:
        return None

    def total(operation: str) -> int:
        return sum(int(count) for _, name, count in rows if name == operation)

    return IoStat(bytes_read=total("Read"), bytes_written=total("Write"))
