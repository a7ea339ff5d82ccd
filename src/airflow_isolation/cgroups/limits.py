"""The limits of a cgroup, all controllers together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from airflow_isolation.cgroups import cpu, cpuset, io, memory, pids
from airflow_isolation.cgroups.directory import MAX

if TYPE_CHECKING:
    from airflow_isolation.cgroups.directory import Cgroup
    from airflow_isolation.container_spec import Resources


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What shall be written; a field that is None is left as it is."""

    cpu: cpu.Cpu = field(default_factory=cpu.Cpu)
    memory: memory.Memory = field(default_factory=memory.Memory)
    pids: pids.Pids = field(default_factory=pids.Pids)
    io: io.Io = field(default_factory=io.Io)
    cpuset: cpuset.Cpuset = field(default_factory=cpuset.Cpuset)

    @property
    def controllers(self) -> frozenset[str]:
        """The controllers without which these limits can't be."""
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
    """A workload's limits. Swap is off unless set."""
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
    """What a purpose's workloads may use together; what is not set is without limit, also where there was one before."""
    if resources == type(resources)():
        return NO_LIMITS
    return Limits(
        cpu=cpu.Cpu(cpus=MAX if resources.cpus is None else resources.cpus),
        memory=memory.Memory(max=MAX if resources.memory is None else resources.memory),
        pids=pids.Pids(max=MAX if resources.pids is None else resources.pids),
    )


def check_limits(limits: Limits) -> None:
    """:raises ValueRefused: a value that the kernel would refuse, or in which nothing can live. Nothing is looked up."""
    cpu.check(limits.cpu)
    memory.check(limits.memory)
    pids.check(limits.pids)
    io.check(limits.io)
    cpuset.check(limits.cpuset)


def set_limits(cgroup: Cgroup, limits: Limits) -> None:
    """Write what is set, and nothing if a value is wrong in itself. May be called twice.

    :raises ValueRefused: by name.
    :raises CgroupError: what the kernel said, with file and value.
    """
    check_limits(limits)
    cpu.set(cgroup, limits.cpu)
    memory.set(cgroup, limits.memory)
    pids.set(cgroup, limits.pids)
    io.set(cgroup, limits.io)
    cpuset.set(cgroup, limits.cpuset)
