"""A container's cgroups by their name, in every hierarchy of the host: those of v1 all have the same path.

The runtime makes them and removes them. When it, its shim and the daemon died half way nobody else does.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_isolation.cgroups.counters import Mounted
from airflow_isolation.cgroups.directory import Cgroup, open_directory
from airflow_isolation.cgroups.errors import CgroupBusy, CgroupGone
from airflow_isolation.cgroups.hierarchy import mounts
from airflow_isolation.cgroups.processes import members

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from types import TracebackType

    from typing_extensions import Self

_PAUSE_SECONDS = 0.01


def names_below(parent: str) -> frozenset[str]:
    """The names of the cgroups directly below ``parent``, in whichever hierarchy. Nothing there is no error."""
    found: set[str] = set()
    for mounted in _hierarchies():
        name = mounted.name(f"/{parent}")
        if name is not None:
            with suppress(OSError), os.scandir(mounted.point / name) as entries:
                found.update(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    return frozenset(found)


def places_of(names: Collection[str]) -> frozenset[tuple[str, str]]:
    """The cgroups of these names, wherever they are: parent and name of each. All cgroups of the host are gone through."""
    wanted = set(names)
    found: set[tuple[str, str]] = set()
    for mounted in _hierarchies():
        for directory, children, _ in os.walk(mounted.point):
            below = os.path.relpath(directory, mounted.point)
            parent = os.path.normpath(f"{mounted.root}/{below}").strip("/")
            found.update((parent, name) for name in wanted.intersection(children) if parent)
    return frozenset(found)


class SameName:
    """The cgroups ``name`` below ``parent`` that there are now, open: what is made anew at their paths is another."""

    def __init__(self, parent: str, name: str) -> None:
        self.path = f"/{parent}/{name}"
        self._levels: list[tuple[Cgroup, Cgroup]] = []
        with ExitStack() as undo:
            undo.callback(self.close)
            for mounted in _hierarchies():
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
        """The names of the cgroups directly in them."""
        found: set[str] = set()
        for _, cgroup in self._levels:
            with suppress(CgroupGone):
                found.update(cgroup.children())
        return frozenset(found)

    def remove(self, seconds: float) -> None:
        """End every process in them, and those that they fork meanwhile, and remove them. Gone already is success.

        :raises CgroupBusy: its processes don't end within ``seconds``, or are not in our pid namespace.
        :raises CgroupError: with the kernel's reason.
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _kill(self) -> bool:
        """Whether there was somebody."""
        found = False
        for _, cgroup in self._levels:
            for each in _with_those_below(cgroup):
                # What the freezer holds does not die of a signal on v1.
                if each.has("freezer.state"):
                    with suppress(CgroupGone):
                        each.write("freezer.state", "THAWED")
                found |= _kill_members(each)
        return found


def _kill_members(cgroup: Cgroup) -> bool:
    with suppress(CgroupGone):
        here = members(cgroup)
        if 0 in here:
            raise CgroupBusy(
                f"the processes in {cgroup.path} are of another pid namespace",
                hint="Run `airflow containers prune` in the host's",
            )
        for pid in here:
            with suppress(ProcessLookupError):
                held = os.pidfd_open(pid)
                try:
                    # Held, the number can't be given to another process.
                    if pid in members(cgroup):
                        signal.pidfd_send_signal(held, signal.SIGKILL)
                finally:
                    os.close(held)
        return bool(here)
    return False


def _remove(level: Cgroup, cgroup: Cgroup, deadline: float) -> None:
    while True:
        try:
            for name in reversed([each.name for each in _with_those_below(cgroup)][1:]):
                parent, _, last = name.removeprefix(f"{cgroup.name}/").rpartition("/")
                with suppress(CgroupGone), cgroup.child(parent) as above:
                    above.remove_child(last)
            name = cgroup.name.rpartition("/")[2]
            with level.child(name) as now:
                if os.path.sameopenfile(now.fileno(), cgroup.fileno()):
                    level.remove_child(name)
        except CgroupGone:
            return
        except CgroupBusy:
            # The kernel may not yet be done with what has just ended.
            if time.monotonic() >= deadline:
                raise
        else:
            return
        time.sleep(_PAUSE_SECONDS)


def _with_those_below(cgroup: Cgroup) -> Iterator[Cgroup]:
    """The cgroup, then those in it, each before those below it. They are open until the next one is asked for."""
    yield cgroup
    waiting = [""]
    while waiting:
        path = waiting.pop()
        with suppress(CgroupGone), cgroup.child(path) as level:
            if path:
                yield level
            waiting += [f"{path}/{name}".lstrip("/") for name in level.children()]


@cache
def _hierarchies() -> tuple[Mounted, ...]:
    """One for each hierarchy: controllers that are mounted together are one, and a host's mounts of cgroups don't change."""
    found: dict[frozenset[str], Mounted] = {}
    try:
        mountinfo = Path("/proc/self/mountinfo").read_text()
    except OSError:
        return ()
    for mount in mounts("\n".join(line for line in mountinfo.splitlines() if " - cgroup" in line)):
        if mount.kind in ("cgroup", "cgroup2"):
            hierarchy = mount.super_options | {mount.kind}
            # Where one is mounted at several places, that which shows the most.
            if hierarchy not in found or len(mount.root) <= len(found[hierarchy].root):
                found[hierarchy] = Mounted(Path(mount.point), mount.root)
    return tuple(found.values())
