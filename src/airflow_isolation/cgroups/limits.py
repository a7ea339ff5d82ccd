"""The limits of a cgroup, all controllers together."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

from airflow_isolation.cgroups import cpu, cpuset, io, memory, pids
from airflow_isolation.cgroups.directory import MAX, Max
from airflow_isolation.cgroups.errors import CgroupError

if TYPE_CHECKING:
    from airflow_isolation.cgroups.directory import Cgroup
    from airflow_isolation.container_spec import Resources


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits to write; a field that is None is left as it is."""

    cpu: cpu.Cpu = field(default_factory=cpu.Cpu)
    memory: memory.Memory = field(default_factory=memory.Memory)
    pids: pids.Pids = field(default_factory=pids.Pids)
    io: io.Io = field(default_factory=io.Io)
    cpuset: cpuset.Cpuset = field(default_factory=cpuset.Cpuset)

    @property
    def controllers(self) -> frozenset[str]:
        """The controllers that these limits need."""
        wanted = {
            "cpu": self.cpu != cpu.Cpu(),
            "memory": self.memory != memory.Memory(),
            "pids": self.pids != pids.Pids(),
            "io": self.io != io.Io(),
            "cpuset": self.cpuset != cpuset.Cpuset(),
        }
        return frozenset(name for name, needed in wanted.items() if needed)


NO_LIMITS = Limits()


def limits_of(resources: Resources) -> Limits:
    """The limits of one workload. Swap is off unless set."""
    high = resources.memory_high
    if high is None:
        high = memory.throttle_from(limit=resources.memory, request=resources.memory_request)
    return Limits(
        cpu=cpu.Cpu(cpus=resources.cpus, weight=resources.cpu_weight),
        memory=memory.Memory(
            max=resources.memory,
            high=high,
            low=resources.memory_request,
            swap=resources.memory_swap or 0,
            oom_group=resources.oom_group,
        ),
        pids=pids.Pids(max=resources.pids),
        io=io.Io(max=resources.io_max, weight=resources.io_weight),
        cpuset=cpuset.Cpuset(cpus=resources.cpuset),
    )


def budget_of(resources: Resources) -> Limits:
    """The limits of all workloads of a purpose together. What is not set becomes "no limit", so that an old limit goes."""
    if resources == type(resources)():
        return NO_LIMITS
    return Limits(
        cpu=cpu.Cpu(cpus=MAX if resources.cpus is None else resources.cpus),
        memory=memory.Memory(max=MAX if resources.memory is None else resources.memory),
        pids=pids.Pids(max=MAX if resources.pids is None else resources.pids),
    )


def read_limits(cgroup: Cgroup) -> Limits:
    """The limits of cpu, memory and pids that hold now; ``MAX`` is no limit, None a controller that is not enabled here.

    :raises CgroupGone: the cgroup has been removed.
    """
    return Limits(cpu=cpu.limits(cgroup), memory=memory.limits(cgroup), pids=pids.limits(cgroup))


def change_of(resources: Resources, now: Limits) -> Limits:
    """What to write to change a workload that has the limits ``now``. What ``resources`` leaves open stays as it is.

    A ``memory.high`` that was computed from request and limit is computed anew; one that was set stays.
    """
    held = now.memory
    low = held.low if resources.memory_request is None else resources.memory_request
    top = held.max if resources.memory is None else resources.memory
    high: int | Max | None = resources.memory_high
    if high is None and held.high == _throttle(held.max, held.low):
        high = _throttle(top, low)
    return Limits(
        cpu=cpu.Cpu(cpus=resources.cpus, weight=resources.cpu_weight),
        memory=memory.Memory(
            max=resources.memory,
            high=None if high == held.high else high,
            low=resources.memory_request,
            swap=resources.memory_swap,
        ),
        pids=pids.Pids(max=resources.pids),
        io=io.Io(max=resources.io_max, weight=resources.io_weight),
        cpuset=cpuset.Cpuset(cpus=resources.cpuset),
    )


def _throttle(limit: int | Max | None, request: int | None) -> int | Max:
    top = limit if isinstance(limit, int) else None
    return memory.throttle_from(limit=top, request=request or None) or MAX


def change_limits(cgroup: Cgroup, change: Limits) -> None:
    """Write limits to a running workload. When the kernel refuses one, those of cpu, memory and pids are put back.

    :raises ValueRefused: a limit is wrong (the error names it), alone or beside those that hold already; or it is less
        memory than is in use.
    :raises CgroupError: the kernel's error, with file and value.
    """
    before = read_limits(cgroup)
    memory.check(_over(before.memory, change.memory))
    try:
        set_limits(cgroup, change)
    except CgroupError:
        with suppress(CgroupError):
            set_limits(cgroup, before)
        raise


def _over(lower: memory.Memory, upper: memory.Memory) -> memory.Memory:
    given = {each.name: getattr(upper, each.name) for each in fields(upper)}
    return replace(lower, **{name: value for name, value in given.items() if value is not None})


def check_limits(limits: Limits) -> None:
    """Check without looking at the host.

    :raises ValueRefused: the kernel would refuse a value, or no process could run with it.
    """
    cpu.check(limits.cpu)
    memory.check(limits.memory)
    pids.check(limits.pids)
    io.check(limits.io)
    cpuset.check(limits.cpuset)


def set_limits(cgroup: Cgroup, limits: Limits) -> None:
    """Check all values, then write those that are set. May be called twice.

    :raises ValueRefused: a value is wrong; the error names it.
    :raises CgroupError: the kernel's error, with file and value.
    """
    check_limits(limits)
    cpu.set(cgroup, limits.cpu)
    memory.set(cgroup, limits.memory)
    pids.set(cgroup, limits.pids)
    io.set(cgroup, limits.io)
    cpuset.set(cgroup, limits.cpuset)
