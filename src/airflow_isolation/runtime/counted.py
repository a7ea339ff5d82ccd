"""Counters of many containers, read from the kernel by the paths of their cgroups.

To ask a daemon takes 50 times as long.
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import TYPE_CHECKING, Final

from airflow_isolation.cgroups import UNIFIED, counters_at, find_mounts, paths_of_process
from airflow_isolation.runtime.interface import Stats

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from airflow_isolation.cgroups import CgroupMounts, Pressure, Statistics
    from airflow_isolation.cgroups.mounted import Mounted

#: The files of v1 that tell what is in use: processor time (nanoseconds), memory (bytes), and the number of processes.
_USE_V1: Final = (("cpuacct", "cpuacct.usage"), ("memory", "memory.usage_in_bytes"), ("pids", "pids.current"))
#: From the processes of so many containers the paths of all containers' cgroups are learned.
_ASKED: Final = 3


def stats_of(now: Statistics) -> Stats | None:
    """The counters; None when no process is in the cgroup, or when that can't be known."""
    if now.memory is None or now.pids is None or not now.pids.current:
        return None
    return Stats(
        cpu_seconds=now.cpu.usage,
        cpu_user=now.cpu.user,
        cpu_system=now.cpu.system,
        cpu_throttled=now.cpu.throttled,
        memory=now.memory.current,
        memory_limit=now.memory.limit,
        memory_peak=now.memory.peak,
        oom_kills=now.memory.events.kills,
        pids=now.pids.current,
        pids_limit=now.pids.limit,
        bytes_read=now.io.bytes_read if now.io else None,
        bytes_written=now.io.bytes_written if now.io else None,
        cpu_pressure=_waiting(now.pressure.cpu),
        memory_pressure=_waiting(now.pressure.memory),
        io_pressure=_waiting(now.pressure.io),
    )


def _waiting(pressure: Pressure | None) -> float | None:
    return pressure.some.avg10 if pressure else None


class CgroupFiles:
    """Finds the cgroups of a daemon's containers, and reads their counters. Several threads may use it."""

    def __init__(self, *patterns: str) -> None:
        """``patterns``: likely paths, with ``{}`` for the container's name in them; others are learned."""
        self._patterns = patterns

    def read(self, names: Mapping[str, str], pid_of: Callable[[str], int]) -> tuple[dict[str, Stats], frozenset[str]]:
        """Counters of the running containers, by id; and the ids whose counters can't be read here.

        ``names`` has for each id its name in paths. ``pid_of`` gives the pid of its first process, 0 when there is none.
        """
        found, unknown = self._read(names)
        for id in sorted(unknown)[:_ASKED]:
            pattern = _pattern(pid_of(id), names[id]) if id in unknown else None
            if pattern is not None and pattern not in self._patterns:
                self._patterns = (*self._patterns, pattern)
                more, unknown = self._read({each: names[each] for each in unknown})
                found.update(more)
        return found, unknown

    def read_use(self, names: Mapping[str, str]) -> dict[str, Stats]:
        """Only processor time, memory and processes, of the running containers whose paths are known; no daemon is asked.

        On v1 this reads a fifth of the files, in a fifth of the time.
        """
        mounts = self._mounts.by_controller
        if not all(controller in mounts for controller, _ in _USE_V1):
            return self._read(names)[0]
        found = {}
        for id, name in names.items():
            for pattern in self._patterns:
                path = pattern.format(name)
                cpu, memory, pids = (_count(mounts[controller], path, file) for controller, file in _USE_V1)
                if cpu is not None and memory is not None and pids:
                    found[id] = Stats(cpu_seconds=cpu / 1e9, memory=memory, pids=pids)
                    break
        return found

    @cached_property
    def _mounts(self) -> CgroupMounts:
        return find_mounts()

    def _read(self, names: Mapping[str, str]) -> tuple[dict[str, Stats], frozenset[str]]:
        found: dict[str, Stats] = {}
        unknown = set()
        for id, name in names.items():
            for pattern in self._patterns:
                with counters_at(pattern.format(name), self._mounts) as counters:
                    now = counters.read()
                if now is not None and now.memory is not None and now.pids is not None:
                    if (stats := stats_of(now)) is not None:
                        found[id] = stats
                    break
            else:
                unknown.add(id)
        return found, frozenset(unknown)


def _count(mounted: Mounted, path: str, file: str) -> int | None:
    """One number from a cgroup's file; None when the kernel has none."""
    name = mounted.name(path)
    if name is None:
        return None
    try:
        descriptor = os.open(f"{mounted.point}/{name}/{file}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return int(os.read(descriptor, 64))
    except (OSError, ValueError):
        return None
    finally:
        os.close(descriptor)


def _pattern(pid: int, name: str) -> str | None:
    paths = paths_of_process(pid)
    path = paths.get("memory") or paths.get(UNIFIED) or ""
    upper, found, rest = path.rpartition(name)
    if not found or "{" in path or "}" in path:
        return None
    return f"{upper}{{}}{rest}"
