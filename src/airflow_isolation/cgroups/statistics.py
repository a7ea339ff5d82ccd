"""The counters of a cgroup, all controllers together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from airflow_isolation.cgroups import cpu, io, memory, pids, pressure

if TYPE_CHECKING:
    from airflow_isolation.cgroups.directory import Cgroup


@dataclass(frozen=True, slots=True, kw_only=True)
class PressureStat:
    """None where the kernel does not measure it."""

    cpu: pressure.Pressure | None = None
    memory: pressure.Pressure | None = None
    io: pressure.Pressure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Each part is None where its controller is not enabled; the time of processors is always counted."""

    cpu: cpu.CpuStat
    memory: memory.MemoryStat | None = None
    pids: pids.PidsStat | None = None
    io: io.IoStat | None = None
    pressure: PressureStat = PressureStat()


def read_statistics(cgroup: Cgroup) -> Statistics:
    """Read all counters of a cgroup and what is below it.

    :raises CgroupGone: the cgroup has been removed.
    """
    return Statistics(
        cpu=cpu.stat(cgroup),
        memory=memory.stat(cgroup),
        pids=pids.stat(cgroup),
        io=io.stat(cgroup),
        pressure=PressureStat(
            cpu=pressure.stat(cgroup, "cpu"), memory=pressure.stat(cgroup, "memory"), io=pressure.stat(cgroup, "io")
        ),
    )
