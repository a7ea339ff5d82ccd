"""The processes of a cgroup: listing, moving, freezing and killing them."""

from __future__ import annotations

import os
import select
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from airflow_isolation.cgroups.directory import flat_keyed
from airflow_isolation.cgroups.errors import CgroupBusy, CgroupError, CgroupGone, ControllerMissing

if TYPE_CHECKING:
    from airflow_isolation.cgroups.directory import Cgroup

PROCS = "cgroup.procs"
_EVENTS = "cgroup.events"
_PAGE = 4096


def members(cgroup: Cgroup) -> tuple[int, ...]:
    """The pids of the processes directly in it. A process that our pid namespace does not see is 0.

    :raises CgroupGone: the cgroup has been removed.
    """
    return tuple(int(line) for line in cgroup.read(PROCS).split())


def move(cgroup: Cgroup, pid: int) -> None:
    """Put a process, with all its threads, into the cgroup. Memory that it uses already stays charged to its old cgroup.

    :raises CgroupBusy: the cgroup hands controllers down to those below, so no process may be in it.
    :raises CgroupError: there is no such process, or the kernel refused for another reason.
    """
    cgroup.write(PROCS, str(pid))


def is_populated(cgroup: Cgroup) -> bool:
    """Whether a process is in it or below it. Zombies don't count.

    :raises CgroupGone: the cgroup has been removed.
    """
    return flat_keyed(cgroup.read(_EVENTS)).get("populated", 0) != 0


def freeze(cgroup: Cgroup, *, frozen: bool = True) -> None:
    """Stop all processes in it and below it, or let them go on. May be called twice.

    :raises CgroupGone: the cgroup has been removed.
    """
    cgroup.write("cgroup.freeze", str(int(frozen)))


def is_frozen(cgroup: Cgroup) -> bool:
    """Whether all processes have stopped; ``freeze`` returns before that.

    :raises CgroupGone: the cgroup has been removed.
    """
    return flat_keyed(cgroup.read(_EVENTS)).get("frozen", 0) != 0


def kill_all(cgroup: Cgroup) -> None:
    """Send SIGKILL to every process in it and below it, and to those that they fork meanwhile. Frozen ones die too.

    Returns at once; ``wait_until_empty`` waits. Success if the cgroup is gone already. May be called twice.
    """
    with suppress(CgroupGone):
        try:
            cgroup.write("cgroup.kill", "1")
        except ControllerMissing:
            # cgroup.kill exists since Linux 5.14. Before: frozen processes can't fork, so one pass reaches all.
            freeze(cgroup)
            _kill_each(cgroup)
            freeze(cgroup, frozen=False)


def wait_until_empty(cgroup: Cgroup, seconds: float) -> None:
    """Wait until no process is in it or below it. Success if the cgroup is gone already.

    :raises CgroupBusy: some are still there after ``seconds``.
    """
    deadline = time.monotonic() + seconds
    try:
        with os.fdopen(cgroup.open_file(_EVENTS), "rb", buffering=0) as events:
            changed = select.poll()
            changed.register(events, select.POLLPRI)
            # poll(2) reports changes since the last read of this descriptor, so read through the same one.
            while flat_keyed(events.read(_PAGE).decode()).get("populated", 0):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise CgroupBusy(f"the processes in {cgroup.path} do not end: {_shown(cgroup)}")
                changed.poll(1000 * left)
                events.seek(0)
    except CgroupGone:
        return
    except OSError as error:
        if not isinstance(cgroup.failure(error, f"read {cgroup.path / _EVENTS}"), CgroupGone):
            raise


def _kill_each(cgroup: Cgroup) -> None:
    waiting = [""]
    while waiting:
        name = waiting.pop()
        with suppress(CgroupGone), cgroup.child(name) as one:
            waiting += [f"{name}/{child}" for child in one.children()]
            for pid in members(one):
                # 0 is a process that this pid namespace does not see; kill(2) would take it for our own process group.
                if pid > 0:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


def _shown(cgroup: Cgroup) -> str:
    try:
        here = members(cgroup)
    except CgroupError:
        here = ()
    return ", ".join(map(str, here[:10])) or "they are in cgroups below it"
