"""A container's cgroups by their name, in every hierarchy of the host: those of v1 all have the same path.

The runtime makes and removes them. This module removes what is left when runtime, shim and daemon died half way.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from airflow_isolation.cgroups.directory import Cgroup, open_directory
from airflow_isolation.cgroups.errors import CgroupBusy, CgroupError, CgroupGone
from airflow_isolation.cgroups.mounted import host_mounts
from airflow_isolation.cgroups.processes import kill_members, remove_when_free

if TYPE_CHECKING:
    from collections.abc import Collection

    from typing_extensions import Self

_PAUSE_SECONDS = 0.01


def names_below(parent: str) -> frozenset[str]:
    """The names of the cgroups directly below ``parent``, in all hierarchies together. A missing parent is no error."""
    found: set[str] = set()
    for mounted in host_mounts().hierarchies:
        name = mounted.name(f"/{parent}")
        if name is not None:
            with suppress(CgroupError), open_directory(mounted.point, name) as level:
                found.update(level.children())
    return frozenset(found)


def places_of(names: Collection[str]) -> frozenset[tuple[str, str]]:
    """The cgroups of these names, wherever they are: parent and name of each. All cgroups of the host are gone through."""
    wanted = set(names)
    found: set[tuple[str, str]] = set()
    for mounted in host_mounts().hierarchies:
        for directory, children, _ in os.walk(mounted.point):
            below = os.path.relpath(directory, mounted.point)
            parent = os.path.normpath(f"{mounted.root}/{below}").strip("/")
            found.update((parent, name) for name in wanted.intersection(children) if parent)
    return frozenset(found)


class SameName:
    """The cgroups ``name`` below ``parent``, opened now. Cgroups that are made later at these paths are not touched."""

    def __init__(self, parent: str, name: str) -> None:
        self.path = f"/{parent}/{name}"
        self._levels: list[tuple[Cgroup, Cgroup]] = []
        with ExitStack() as undo:
            undo.callback(self.close)
            for mounted in host_mounts().hierarchies:
                above = mounted.name(f"/{parent}")
                if above is None:
                    continue
                with suppress(CgroupGone), ExitStack() as opened:
                    level = opened.enter_context(open_directory(mounted.point, above))
                    self._levels.append((level, opened.enter_context(level.child(name))))
                    opened.pop_all()
            undo.pop_all()

    def __bool__(self) -> bool:
        return bool(self._levels)

    def below(self) -> frozenset[str]:
        """The names of the cgroups directly below these."""
        found: set[str] = set()
        for _, cgroup in self._levels:
            with suppress(CgroupGone):
                found.update(cgroup.children())
        return frozenset(found)

    def remove(self, seconds: float) -> None:
        """End every process in them, and those that they fork meanwhile, and remove them. Success if they are gone already.

        :raises CgroupBusy: the processes don't end within ``seconds``, or are not in our pid namespace.
        :raises CgroupError: the kernel refused; the error has its reason.
        """
        deadline = time.monotonic() + seconds
        while self._kill():
            if time.monotonic() >= deadline:
                raise CgroupBusy(f"the processes in the cgroups {self.path} don't end")
            time.sleep(_PAUSE_SECONDS)
        for level, cgroup in self._levels:
            _remove(level, cgroup, deadline)

    def close(self) -> None:
        """May be called twice."""
        while self._levels:
            for cgroup in self._levels.pop():
                cgroup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _kill(self) -> bool:
        """Send SIGKILL to all processes, and tell whether there were any."""
        found = False
        for _, cgroup in self._levels:
            for each in cgroup.walk():
                with suppress(CgroupGone):
                    # What the freezer holds does not die of a signal on v1.
                    if each.has("freezer.state"):
                        each.write("freezer.state", "THAWED")
                    here = kill_members(each)
                    if 0 in here:
                        raise CgroupBusy(
                            f"the processes in {each.path} are of another pid namespace",
                            hint="Run `airflow containers prune` in the host's",
                        )
                    found |= bool(here)
        return found


def _remove(level: Cgroup, cgroup: Cgroup, deadline: float) -> None:
    def remove() -> None:
        cgroup.remove_below()
        name = cgroup.name.rpartition("/")[2]
        with level.child(name) as now:
            if os.path.sameopenfile(now.fileno(), cgroup.fileno()):
                level.remove_child(name)

    remove_when_free(remove, deadline)
