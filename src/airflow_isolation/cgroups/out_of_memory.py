"""Finds which limit made the kernel kill a workload for memory, from counters before and after; and words it.

A kill is counted in ``memory.events`` (``oom_kill``) of the victim's cgroup and of all above it, whichever limit was
reached. ``memory.events.local`` (``oom``) tells which: it counts only in the cgroup that reached its limit. When no
cgroup reached its limit, the host's memory was used up. (mm/memcontrol.c, mm/oom_kill.c)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from airflow_isolation.cgroups import memory
from airflow_isolation.cgroups.directory import Cgroup, open_cgroup
from airflow_isolation.cgroups.words import amount, share

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow_isolation.cgroups.kernel_log import Victim
    from airflow_isolation.cgroups.tree import Tree


class Limit(str, Enum):
    """Which memory was used up. ``OUTER`` is a cgroup above ours, such as the worker's systemd unit."""

    OWN = "own limit"
    PURPOSE = "purpose budget"
    ALL_WORKLOADS = "budget of all workloads"
    OUTER = "outer limit"
    HOST = "host"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLevel:
    """A cgroup above the workload: how often its own limit was reached."""

    limit: Limit
    name: str
    oom: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySample:
    """A workload's memory counters at one moment. ``levels`` are the cgroups above it, the nearest first."""

    events: memory.MemoryEvents = field(default_factory=memory.MemoryEvents)
    levels: tuple[MemoryLevel, ...] = ()
    peak: int | None = None
    limit: int | None = None
    oom_group: bool = True


#: The sample of a workload that has just been made. It has no levels: they may be older than the workload.
NOTHING_YET = MemorySample(events=memory.MemoryEvents(oom_group_kill=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class OutOfMemory:
    """The kernel has killed processes of this workload for memory.

    Attributes:
        fatal: the workload died of it. False: a child was killed, and the workload went on.
        limit: which memory was used up.
        cgroup: the cgroup whose limit was reached, below the mount; "" is the host.
        kills: how often; a whole cgroup at a time counts once.
        peak, size: the workload's peak and its own limit in bytes, None where not known or not limited.
        victims: the processes that the kernel chose; empty when its log can't be read.

    """

    fatal: bool
    limit: Limit
    cgroup: str = ""
    kills: int = 1
    peak: int | None = None
    size: int | None = None
    victims: tuple[Victim, ...] = ()

    @property
    def sentence(self) -> str:
        """For the task log: what happened, which limit, the peak, who was killed, and the setting to raise."""
        what = (
            "The kernel killed this workload because memory ran out"
            if self.fatal
            else f"The kernel killed {'a process' if self.kills == 1 else 'processes'} of this workload because memory ran out, and the workload went on"
        )
        peak = f"; its peak was {amount(self.peak)}{share(self.peak, self.size)}" if self.peak is not None else ""
        named = ", ".join(f"{victim.name} (process {victim.pid})" for victim in self.victims[-3:])
        killed = f" Killed: {named}." if named else ""
        return f"{what}: {self._whose()}{peak}.{killed} {self._remedy()}"

    def _whose(self) -> str:
        own = f", not its own limit of {amount(self.size)}" if self.size is not None else ""
        return {
            Limit.OWN: f"it reached its own limit, memory = {amount(self.size)}"
            if self.size is not None
            else "it reached a limit of its own",
            Limit.PURPOSE: f"the workloads of its purpose together reached their budget ({self.cgroup}){own}",
            Limit.ALL_WORKLOADS: f"all workloads together reached their budget ({self.cgroup}){own}",
            Limit.OUTER: f"the limit of the cgroup {self.cgroup}, above ours, was reached{own}",
            Limit.HOST: f"the host had no memory left{own}",
        }[self.limit]

    def _remedy(self) -> str:
        return {
            Limit.OWN: "Raise resources.memory.",
            Limit.PURPOSE: "Raise budget_memory, or let fewer run at the same time.",
            Limit.ALL_WORKLOADS: "Raise budget_memory, or let fewer run at the same time.",
            Limit.OUTER: "Raise that limit (MemoryMax= in a systemd unit), or let fewer run at the same time.",
            Limit.HOST: "Set memory and budget_memory so that workloads can't use up the host.",
        }[self.limit]


def take_sample(cgroup: Cgroup, tree: Tree) -> MemorySample:
    """The sample of a workload now. Take one after it was made, and one before it is removed.

    :raises CgroupGone: it has been removed.
    """
    stat = memory.stat(cgroup)
    return MemorySample(
        events=stat.events if stat else memory.MemoryEvents(),
        levels=tuple(_levels(cgroup, tree)),
        peak=stat.peak if stat else None,
        limit=stat.limit if stat else None,
        oom_group=(cgroup.read_if_there("memory.oom.group") or "").strip() == "1",
    )


def attribute(
    before: MemorySample,
    after: MemorySample,
    *,
    killed: bool,
    pid: int = 0,
    victims: Sequence[Victim] = (),
) -> OutOfMemory | None:
    """What the kernel killed for memory between two samples; None when nothing, whoever else sent a SIGKILL.

    ``killed``: the workload's main process was ended by SIGKILL. ``pid``: that process, in the host's pid namespace, 0
    when not known. ``victims``: those of this workload in the kernel's log; they decide what counters leave open.
    """
    if after.events.oom_kill <= before.events.oom_kill:
        return None
    limit, cgroup = _whose(before, after, victims)
    return OutOfMemory(
        fatal=killed and _was_main(before, after, pid, victims),
        limit=limit,
        cgroup=cgroup,
        kills=max(1, after.events.kills - before.events.kills),
        peak=after.peak,
        size=after.limit,
        victims=tuple(victims),
    )


def _whose(before: MemorySample, after: MemorySample, victims: Sequence[Victim]) -> tuple[Limit, str]:
    if victims:
        # The log names the cgroup. In a container, its paths may begin above our mount.
        named = victims[-1].limit
        if named is None:
            return Limit.HOST, ""
        for level in after.levels:
            if named.strip("/") == level.name or (level.name and named.endswith(f"/{level.name}")):
                return level.limit, level.name
        inside = victims[-1].cgroup == named or victims[-1].cgroup.startswith(f"{named}/")
        own = after.events.oom > before.events.oom
        return (Limit.OWN, "") if inside and own else (Limit.OUTER, named.strip("/"))
    if after.events.oom > before.events.oom:
        return Limit.OWN, ""
    earlier = {level.name: level.oom for level in before.levels}
    for level in after.levels:
        if level.oom > earlier.get(level.name, 0):
            return level.limit, level.name
    return Limit.HOST, ""


def _was_main(before: MemorySample, after: MemorySample, pid: int, victims: Sequence[Victim]) -> bool:
    """Whether the main process was killed for memory, if it died of SIGKILL and something was killed for memory."""
    if before.events.oom_group_kill is not None and after.events.oom_group_kill is not None:
        if after.events.oom_group_kill > before.events.oom_group_kill:
            return True
        if after.oom_group:
            # With oom_group all would have died together. So the limit is one that the workload set on a cgroup it made.
            return bool(pid) and any(victim.pid == pid for victim in victims)
    if pid and victims:
        return any(victim.pid == pid for victim in victims)
    return True


def _levels(cgroup: Cgroup, tree: Tree) -> list[MemoryLevel]:
    levels = []
    parts = cgroup.name.split("/")[:-1]
    purpose = len(parts)
    for depth in range(purpose, 0, -1):
        name = "/".join(parts[:depth])
        if depth == purpose:
            limit = Limit.PURPOSE
        elif name == tree.root or name.startswith(f"{tree.delegated}/" if tree.delegated else ""):
            limit = Limit.ALL_WORKLOADS
        else:
            limit = Limit.OUTER
        with open_cgroup(cgroup.mount, name) as level:
            levels.append(MemoryLevel(limit=limit, name=name, oom=memory.own_events(level).oom))
    return levels
