"""Hiding the processes of other users in the /proc of a container that is in the host's pid namespace.

containerd mounts /proc as it is told to. Docker mounts it itself, and no option of it hides anything. But each mount of
/proc has options of its own (Linux 5.8), and root of the host may change them from outside of the container.

Sources: proc(5), hidepid; fspick(2), fsconfig(2).
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from airflow_isolation.cgroups.hierarchy import mounts
from airflow_isolation.errors import ContainerFailed
from airflow_isolation.oci.confinement import HIDDEN_PROCESSES

_LIBC = ctypes.CDLL(None, use_errno=True)

# The numbers are those of all architectures; linux/mount.h.
_FSCONFIG, _FSPICK = 431, 433
_FSPICK_CLOEXEC, _FSPICK_EMPTY_PATH = 1, 8
_FSCONFIG_SET_STRING, _FSCONFIG_CMD_RECONFIGURE = 1, 7


def hide_processes(pid: int) -> None:
    """See to it that in the /proc of process ``pid`` a user finds its own processes alone. May be called twice.

    :raises ContainerFailed: it could not be done, or the process is gone.
    """
    try:
        if not _are_hidden(pid):
            _hide(pid)
        if _are_hidden(pid):
            return
        why = "the kernel does not say so"
    except OSError as error:
        why = str(error)
    raise ContainerFailed(f"The processes of others could not be hidden from the container's /proc: {why}")


def _are_hidden(pid: int) -> bool:
    found = [mount for mount in mounts(Path(f"/proc/{pid}/mountinfo").read_text()) if mount.point == "/proc"]
    return bool(found) and found[-1].super_options.issuperset(HIDDEN_PROCESSES)


def _hide(pid: int) -> None:
    place = os.open(f"/proc/{pid}/root/proc", os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if os.fstat(place).st_dev == Path("/proc").stat().st_dev:
            raise OSError("it is the host's own")
        picked = _call(_FSPICK, place, b"", _FSPICK_CLOEXEC | _FSPICK_EMPTY_PATH)
    finally:
        os.close(place)
    try:
        for option in HIDDEN_PROCESSES:
            name, _, value = option.encode().partition(b"=")
            _call(_FSCONFIG, picked, _FSCONFIG_SET_STRING, name, value, 0)
        _call(_FSCONFIG, picked, _FSCONFIG_CMD_RECONFIGURE, None, None, 0)
    finally:
        os.close(picked)


def _call(number: int, *arguments: int | bytes | None) -> int:
    passed = (ctypes.c_long(each) if isinstance(each, int) else ctypes.c_char_p(each) for each in arguments)
    result: int = _LIBC.syscall(ctypes.c_long(number), *passed)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
