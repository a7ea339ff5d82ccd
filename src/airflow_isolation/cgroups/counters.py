"""The counters of one container, on any host: with cgroup v2, with v1, or with some controllers of each.

They are found by the container's first process, or by the path of its cgroups. They stay open, so that they can be read
as long as the directory exists, even without a process in it.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from airflow_isolation.cgroups import memory, pids, v1
from airflow_isolation.cgroups.directory import Cgroup, flat_keyed, open_directory
from airflow_isolation.cgroups.errors import CgroupError, CgroupGone
from airflow_isolation.cgroups.kernel_log import read_victims
from airflow_isolation.cgroups.mounted import PROC, UNIFIED, CgroupMounts, find_mounts, paths_of_process
from airflow_isolation.cgroups.out_of_memory import MemorySample, take_sample
from airflow_isolation.cgroups.statistics import Statistics, read_statistics
from airflow_isolation.cgroups.tree import Tree, directory_around

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from typing_extensions import Self

_V1: Final = ("memory", "cpuacct", "cpu", "pids", "blkio")


class Counters:
    """Open cgroups of one container. What is gone or can't be read is None; no method raises for it."""

    def __init__(self, cgroups: Mapping[str, Cgroup], tree: Tree | None = None) -> None:
        """``cgroups``: v1's by controller, or v2's under the name ``""``. This object closes them.

        ``tree``: the tree that holds the container's directory, if we made that directory.
        """
        self._cgroups = dict(cgroups)
        self._tree = tree
        self._last_sample: MemorySample | None = None

    def __bool__(self) -> bool:
        return bool(self._cgroups)

    @property
    def name(self) -> str:
        """The directory's name, which the kernel's log uses for the container; "" when there is none."""
        cgroup = self._cgroups.get("memory") or self._cgroups.get(UNIFIED)
        return cgroup.name.rpartition("/")[2] if cgroup else ""

    def read(self) -> Statistics | None:
        """All counters, as they are now."""
        try:
            unified = self._cgroups.get(UNIFIED)
            return read_statistics(unified) if unified else self._read_v1()
        except (CgroupError, OSError, ValueError):
            return None

    def oom_kills(self) -> int | None:
        """How many processes of the container the kernel has killed for memory."""
        try:
            if (unified := self._cgroups.get(UNIFIED)) is not None:
                return flat_keyed(unified.read_if_there("memory.events") or "").get("oom_kill")
            held = self._cgroups.get("memory")
            return v1.oom_kills(held) if held else None
        except (CgroupError, OSError, ValueError):
            return None

    def memory_sample(self) -> MemorySample | None:
        """The sample for ``attribute`` now. (For one at the container's start, ``attribute`` takes that nothing had
        happened.)
        """
        try:
            unified, held = self._cgroups.get(UNIFIED), self._cgroups.get("memory")
            if unified and self._tree:
                self._last_sample = take_sample(unified, self._tree)
                return self._last_sample
            now = memory.stat(unified) if unified else v1.memory_stat(held) if held else None
        except CgroupGone:
            return self._sample_of_the_kernels_log()
        except (CgroupError, OSError, ValueError):
            return None
        if now is None:
            return None
        self._last_sample = MemorySample(events=now.events, peak=now.peak, limit=now.limit, oom_group=False)
        return self._last_sample

    def close(self) -> None:
        """May be called twice."""
        for cgroup in self._cgroups.values():
            cgroup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sample_of_the_kernels_log(self) -> MemorySample | None:
        """The sample when the cgroup is gone: systemd removes an empty scope at once, and its counters with it.

        The kernel's log still tells who was killed; None when it names nobody. The peak is not known: the last one seen is
        too old.
        """
        last, name = self._last_sample, self.name
        victims = read_victims(name) if last is not None and name else ()
        if last is None or not victims:
            return None
        own = sum((victim.limit or "").endswith(f"/{name}") for victim in victims)
        events = replace(last.events, oom=max(last.events.oom, own), oom_kill=max(last.events.oom_kill, len(victims)))
        return replace(last, events=events, peak=None)

    def _read_v1(self) -> Statistics | None:
        held = self._cgroups
        if "cpuacct" not in held:
            return None
        cpu = v1.cpu_stat(held["cpuacct"], held.get("cpu"))
        if cpu is None:
            return None
        return Statistics(
            cpu=cpu,
            memory=v1.memory_stat(held["memory"]) if "memory" in held else None,
            pids=pids.stat(held["pids"]) if "pids" in held else None,
            io=v1.io_stat(held["blkio"]) if "blkio" in held else None,
        )


def counters_of_process(pid: int, mounts: CgroupMounts | None = None, *, proc: Path = PROC) -> Counters:
    """The counters of the container whose first process is ``pid`` in our pid namespace."""
    return _opened(paths_of_process(pid, proc=proc), mounts or find_mounts(proc))


def counters_at(path: str, mounts: CgroupMounts) -> Counters:
    """The counters of the container whose cgroups have this path in every hierarchy, as runtimes make them."""
    return _opened(dict.fromkeys((UNIFIED, *_V1), path), mounts)


def _opened(paths: Mapping[str, str], mounts: CgroupMounts) -> Counters:
    here = mounts.by_controller
    # On a hybrid host v2 has no counters of a container.
    wanted = _V1 if "memory" in here or UNIFIED not in here else (UNIFIED,)
    cgroups: dict[str, Cgroup] = {}
    tree = None
    with ExitStack() as undo:
        for controller in wanted:
            mounted = here.get(controller)
            name = mounted.name(paths[controller]) if mounted and controller in paths else None
            if mounted is None or name is None:
                continue
            if controller == UNIFIED and (ours := directory_around(name)):
                # Our directory stays when the runtime's own is removed.
                root, name = ours
                tree = Tree(mount=mounted.point, root=root)
            try:
                cgroups[controller] = undo.enter_context(open_directory(mounted.point, name))
            except (CgroupError, OSError):
                continue
        undo.pop_all()
    return Counters(cgroups, tree)
