"""Moves a process into the cgroups of another one, in every hierarchy of this host; and kills what is left in a cgroup."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from airflow_isolation.cgroups.directory import open_directory
from airflow_isolation.cgroups.errors import CgroupBusy, CgroupError, CgroupGone
from airflow_isolation.cgroups.mounted import UNIFIED, host_mounts, paths_of_process
from airflow_isolation.cgroups.processes import PROCS, kill_members

_PAUSE_SECONDS = 0.01


def join_cgroups_of(model: int, pid: int) -> None:
    """Move process ``pid`` into all cgroups of process ``model``; both pids are of our pid namespace. May be called twice.

    :raises CgroupError: it could not be moved into all of them.
    """
    wanted, here = paths_of_process(model), paths_of_process(pid)
    if not wanted or not here:
        raise CgroupError(f"process {pid if wanted else model} is gone")
    done = set()
    for controller, path in wanted.items():
        if here.get(controller) == path:
            continue
        mounted = host_mounts().by_controller.get(controller)
        name = mounted.name(path) if mounted else None
        if mounted is None or name is None:
            raise CgroupError(f"the cgroup {path} of {controller or 'cgroup v2'} can't be seen here")
        directory = mounted.point / name
        if directory in done:
            continue
        done.add(directory)
        try:
            descriptor = os.open(directory / PROCS, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                os.write(descriptor, str(pid).encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CgroupError(
                f"process {pid} could not be moved into {directory}: {error.strerror}",
                hint="Only root may move it" if isinstance(error, PermissionError) else "",
            ) from error


def own_cgroup_of(pid: int) -> Path | None:
    """The directory of the cgroup that only this container uses, given its first process; None when others may use it too.

    On a host with v1 it is the cgroup of the pids controller, which every runtime makes.
    """
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None
    for controller in ("pids", UNIFIED):
        path, mounted = paths_of_process(pid).get(controller), host_mounts().by_controller.get(controller)
        if path is None or mounted is None:
            continue
        name = mounted.name(path)
        # If the runtime made no cgroup, the process is in the shim's, and other processes may be in there too.
        others = [paths_of_process(other).get(controller) or path for other in (parent, os.getpid())]
        if name and all(f"{other}/".startswith(f"{path.rstrip('/')}/") is False for other in others):
            return mounted.point / name
    return None


def end_everyone_in(directory: Path, *, seconds: float = 5.0) -> None:
    """Kill every process in a cgroup, also those that they fork meanwhile. Success if it is gone or empty already.

    :raises CgroupError: some are still there after so many seconds.
    """
    deadline = time.monotonic() + seconds
    with suppress(CgroupGone), open_directory(directory.parent, directory.name) as cgroup:
        while here := kill_members(cgroup):
            if time.monotonic() >= deadline:
                raise CgroupBusy(f"processes in {directory} don't end: {sorted(here)}")
            time.sleep(_PAUSE_SECONDS)
