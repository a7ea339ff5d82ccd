"""The memory controller: memory.max, high, low, swap.max, oom.group; current, peak, events."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from airflow_isolation.cgroups.directory import MAX, Max, flat_keyed, limit_or_max, limit_or_none
from airflow_isolation.cgroups.errors import ValueRefused

if TYPE_CHECKING:
    from airflow_isolation.cgroups.directory import Cgroup

# No process can run in less; Docker refuses less too.
MIN_LIMIT: Final = 6 * 1024 * 1024
# kubelet's memoryThrottlingFactor (KEP-2570)
_THROTTLING_FACTOR = (9, 10)
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes.

    Attributes:
        max: the limit. When it is reached and nothing can be reclaimed, the kernel kills.
        high: over it, the kernel slows the processes down and reclaims memory, but kills nothing.
        low: up to here the kernel does not take memory away when others need some.
        swap: how much may be in swap, besides ``max``; 0 is none.
        oom_group: when one process is killed for memory, all are.

    """

    max: int | Max | None = None
    high: int | Max | None = None
    low: int | None = None
    swap: int | Max | None = None
    oom_group: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEvents:
    """How often memory ran out in a cgroup and all below it.

    ``oom``: the limit was reached and nothing could be reclaimed. ``oom_kill``: processes killed for memory, whichever
    cgroup's limit was reached. ``oom_group_kill``: kills of a whole cgroup; None before Linux 5.17, which doesn't count them.
    """

    high: int = 0
    max: int = 0
    oom: int = 0
    oom_kill: int = 0
    oom_group_kill: int | None = None

    @property
    def kills(self) -> int:
        """How often the kernel had to kill for memory; a whole cgroup killed counts once. ``oom_kill`` counts each of its
        processes. It counts the chosen process twice if that has not ended when the others are killed (mm/oom_kill.c).
        """
        return self.oom_group_kill or self.oom_kill


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryStat:
    """Bytes. None means no limit, or that this kernel does not have the figure (``peak`` exists from 5.19 on)."""

    current: int
    peak: int | None = None
    limit: int | None = None
    high: int | None = None
    swap: int | None = None
    events: MemoryEvents = MemoryEvents()


def set(cgroup: Cgroup, memory: Memory) -> None:
    """Write the fields that are set. May be called twice.

    The kernel would kill processes to meet a limit below the memory in use. So the value is first written to
    ``memory.high``, over which the kernel only reclaims. If more is still in use after that, the limit is refused.

    :raises ValueRefused: the limit is below the memory in use, or a value is out of range.
    """
    check(memory)
    if memory.oom_group is not None:
        cgroup.write("memory.oom.group", str(int(memory.oom_group)))
    if memory.swap is not None and not (memory.swap == 0 and not cgroup.has("memory.swap.max")):
        # A kernel without swap accounting has no such file. An empty string is never written: the kernel would read 0.
        cgroup.write("memory.swap.max", str(memory.swap))
    if memory.low is not None:
        cgroup.write("memory.low", str(memory.low))
    if isinstance(memory.max, int):
        _make_room(cgroup, memory.max)
    if memory.max is not None:
        cgroup.write("memory.max", str(memory.max))
    if memory.high is not None:
        cgroup.write("memory.high", str(memory.high))


def check(memory: Memory) -> None:
    """Check without writing.

    :raises ValueRefused: the kernel would refuse a value, or no process could run with it.
    """
    if isinstance(memory.max, int) and memory.max < MIN_LIMIT:
        raise ValueRefused(f"memory is {memory.max} bytes", hint=f"Give at least {MIN_LIMIT} bytes")
    for name, value in (("memory_high", memory.high), ("memory_request", memory.low), ("memory_swap", memory.swap)):
        if isinstance(value, int) and value < 0:
            raise ValueRefused(f"{name} is {value} bytes", hint="Give 0 or more")
    if isinstance(memory.max, int):
        for name, value in (("memory_high", memory.high), ("memory_request", memory.low)):
            if isinstance(value, int) and value > memory.max:
                raise ValueRefused(
                    f"{name} is {value} bytes, and memory only {memory.max}", hint=f"Give {name} less than memory"
                )


def limits(cgroup: Cgroup) -> Memory:
    """The values that hold now; a field is None when the kernel does not have it, or the controller is not enabled."""
    return Memory(
        max=limit_or_max(cgroup.read_if_there("memory.max")),
        high=limit_or_max(cgroup.read_if_there("memory.high")),
        low=limit_or_none(cgroup.read_if_there("memory.low")),
        swap=limit_or_max(cgroup.read_if_there("memory.swap.max")),
    )


def stat(cgroup: Cgroup) -> MemoryStat | None:
    """The memory in use, its peak, limit and events now; None where the controller is not enabled.

    :raises CgroupGone: the cgroup has been removed.
    """
    current = limit_or_none(cgroup.read_if_there("memory.current"))
    if current is None:
        return None
    return MemoryStat(
        current=current,
        peak=limit_or_none(cgroup.read_if_there("memory.peak")),
        limit=limit_or_none(cgroup.read("memory.max")),
        high=limit_or_none(cgroup.read("memory.high")),
        swap=limit_or_none(cgroup.read_if_there("memory.swap.current")),
        events=parse_events(cgroup.read("memory.events")),
    )


def own_events(cgroup: Cgroup) -> MemoryEvents:
    """The events of this cgroup alone: at its own limit, and of processes directly in it. All 0 without the controller."""
    return parse_events(cgroup.read_if_there("memory.events.local") or "")


def parse_events(content: str) -> MemoryEvents:
    """The content of memory.events or memory.events.local."""
    counters = flat_keyed(content)
    return MemoryEvents(
        high=counters.get("high", 0),
        max=counters.get("max", 0),
        oom=counters.get("oom", 0),
        oom_kill=counters.get("oom_kill", 0),
        oom_group_kill=counters.get("oom_group_kill"),
    )


def throttle_from(*, limit: int | None, request: int | None) -> int | None:
    """memory.high as kubelet sets it: request + 0.9 · (limit - request), in whole pages.

    None without a limit or a request, and when they are equal: then nothing is slowed down before the limit.

    >>> throttle_from(limit=1000 * 4096, request=500 * 4096) // 4096
    950
    """
    if limit is None or request is None or request >= limit:
        return None
    above, below = _THROTTLING_FACTOR
    return (request + (limit - request) * above // below) // _PAGE * _PAGE


def _make_room(cgroup: Cgroup, limit: int) -> None:
    if _current(cgroup) <= limit or limit_or_none(cgroup.read("memory.max")) == limit:
        return
    before = cgroup.read("memory.high").strip()
    cgroup.write("memory.high", str(limit))
    current = _current(cgroup)
    cgroup.write("memory.high", before)
    if current > limit:
        raise ValueRefused(
            f"memory {limit} bytes is less than the {current} bytes that {cgroup.path} has in use, and the kernel would "
            "kill its processes to meet it",
            hint="Give more",
        )


def _current(cgroup: Cgroup) -> int:
    return limit_or_none(cgroup.read("memory.current")) or 0


__all__ = [
    "MAX",
    "MIN_LIMIT",
    "Memory",
    "MemoryEvents",
    "MemoryStat",
    "check",
    "limits",
    "own_events",
    "parse_events",
    "set",
    "stat",
    "throttle_from",
]
