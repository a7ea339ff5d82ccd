"""The limits of a cgroup, all controllers together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from airflow_isolation.cgroups import cpu, cpuset, io, memory, pids

if TYPE_CHECKING:
    from airflow_isolation.cgroups.directory import Cgroup


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
