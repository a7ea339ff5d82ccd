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
    from collections.abc import Callable

    from airflow_isolation.cgroups.directory import Cgroup

PROCS = "cgroup.procs"
_EVENTS = "cgroup.events"
_PAGE = 4096
_PAUSE_SECONDS = 0.01


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
            for each in cgroup.walk():
                with suppress(CgroupGone):
                    kill_members(each)
            freeze(cgroup, frozen=False)


def kill_members(cgroup: Cgroup) -> tuple[int, ...]:
    """Send SIGKILL to every process directly in it, and tell who was there; 0 is one of another pid namespace, and spared.

    :raises CgroupGone: the cgroup has been removed.
    """
    here = members(cgroup)
    # To kill(2), 0 would be ourselves.
    for pid in filter(None, here):
        with suppress(ProcessLookupError):
            held = os.pidfd_open(pid)
            try:
                # Held, the number can't be given to another process.
                if pid in members(cgroup):
                    signal.pidfd_send_signal(held, signal.SIGKILL)
            finally:
                os.close(held)
    return here


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


def remove_when_free(remove: Callable[[], None], deadline: float) -> None:
    """Call ``remove`` until it goes through, at ``deadline`` (of ``time.monotonic``) for the last time. Gone already is success.

    :raises CgroupBusy: somebody is in there, or the kernel is still not done with what has ended.
    """
    while True:
        try:
            remove()
        except CgroupGone:
            return
        except CgroupBusy:
            if time.monotonic() >= deadline:
                raise
        else:
            return
        time.sleep(_PAUSE_SECONDS)


def _shown(cgroup: Cgroup) -> str:
    try:
        here = members(cgroup)
    except CgroupError:
        here = ()
    return ", ".join(map(str, here[:10])) or "they are in cgroups below it"
