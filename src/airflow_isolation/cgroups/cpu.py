"""The cpu controller: cpu.max, cpu.max.burst, cpu.weight, cpu.stat."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from airflow_isolation.cgroups.directory import MAX, Max, flat_keyed, limit_or_none
from airflow_isolation.cgroups.errors import ValueRefused

if TYPE_CHECKING:
    from airflow_isolation.cgroups.directory import Cgroup

# Microseconds. The kernel's default period; its smallest quota (kernel/sched/core.c, min_cfs_quota_period) is 1 ms.
_PERIOD = 100_000
_LEAST_QUOTA = 1_000
MIN_CPUS = _LEAST_QUOTA / _PERIOD
MAX_CPUS = 8192
MIN_WEIGHT, DEFAULT_WEIGHT, MAX_WEIGHT = 1, 100, 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """``cpus`` in cores; ``weight`` 1 to 10000 against siblings, of which 100 is usual; ``burst`` in seconds of CPU time."""

    cpus: float | Max | None = None
    weight: int | None = None
    burst: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuStat:
    """Seconds of CPU time since the cgroup was made, all below it included.

    ``throttled`` is how long its processes had to wait because of the limit; ``limit`` is the limit in cores.
    """

    usage: float
    user: float
    system: float
    throttled: float = 0.0
    periods: int = 0
    periods_throttled: int = 0
    limit: float | None = None


def set(cgroup: Cgroup, cpu: Cpu) -> None:
    """Write the fields that are set. May be called twice.

    :raises ValueRefused: a value is out of range (the error names it), or the kernel refused it.
    """
    check(cpu)
    if cpu.weight is not None:
        cgroup.write("cpu.weight", str(cpu.weight))
    if cpu.cpus is not None:
        cgroup.write("cpu.max", f"{MAX if cpu.cpus == MAX else round(cpu.cpus * _PERIOD)} {_PERIOD}")
    if cpu.burst is not None:
        # After the quota, because the burst may not be larger.
        cgroup.write("cpu.max.burst", str(round(cpu.burst * 1e6)))


def check(cpu: Cpu) -> None:
    """Check without writing.

    :raises ValueRefused: the kernel would refuse a value.
    """
    if cpu.cpus is not None and cpu.cpus != MAX and not (math.isfinite(cpu.cpus) and MIN_CPUS <= cpu.cpus <= MAX_CPUS):
        raise ValueRefused(f"cpus is {cpu.cpus:g}", hint=f"Give cores, {MIN_CPUS} to {MAX_CPUS}")
    if cpu.weight is not None and not MIN_WEIGHT <= cpu.weight <= MAX_WEIGHT:
        raise ValueRefused(f"cpu_weight is {cpu.weight}", hint=f"Give {MIN_WEIGHT} to {MAX_WEIGHT}; 100 is usual")
    if cpu.burst is not None and not (math.isfinite(cpu.burst) and cpu.burst >= 0):
        raise ValueRefused(f"the burst is {cpu.burst:g} s", hint="Give seconds of CPU time, 0 for none")


def stat(cgroup: Cgroup) -> CpuStat:
    """What cpu.stat and cpu.max say now.

    :raises CgroupGone: the cgroup has been removed.
    """
    # cpu.stat is there without the controller too, which adds only the figures on throttling.
    counters = flat_keyed(cgroup.read("cpu.stat"))
    return CpuStat(
        usage=counters.get("usage_usec", 0) / 1e6,
        user=counters.get("user_usec", 0) / 1e6,
        system=counters.get("system_usec", 0) / 1e6,
        throttled=counters.get("throttled_usec", 0) / 1e6,
        periods=counters.get("nr_periods", 0),
        periods_throttled=counters.get("nr_throttled", 0),
        limit=parse_limit(cgroup.read_if_there("cpu.max")),
    )


def limits(cgroup: Cgroup) -> Cpu:
    """The values that hold now; a field is None where the controller is not enabled."""
    quota, weight = cgroup.read_if_there("cpu.max"), limit_or_none(cgroup.read_if_there("cpu.weight"))
    return Cpu(cpus=None if quota is None else parse_limit(quota) or MAX, weight=weight)


def parse_limit(content: str | None) -> float | None:
    r"""Cores.

    >>> parse_limit("150000 100000\n"), parse_limit("max 100000\n")
    (1.5, None)
    """
    words = (content or "").split()
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0] != MAX else None
