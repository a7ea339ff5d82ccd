"""Putting a process where another one is, in every hierarchy of this host."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_isolation.cgroups.counters import UNIFIED, Mounted, paths_of_process
from airflow_isolation.cgroups.errors import CgroupError
from airflow_isolation.cgroups.hierarchy import mounts

if TYPE_CHECKING:
    from collections.abc import Mapping

_PROCS = "cgroup.procs"


def join_cgroups_of(model: int, pid: int) -> None:
    """Move process ``pid`` into all cgroups of process ``model``; both in our pid namespace. May be called twice.

    :raises CgroupError: it could not be moved into all of them.
    """
    wanted, here = paths_of_process(model), paths_of_process(pid)
    if not wanted or not here:
        raise CgroupError(f"process {pid if wanted else model} is gone")
    done = set()
    for controller, path in wanted.items():
        if here.get(controller) == path:
            continue
        mounted = _mounted().get(controller)
        name = mounted.name(path) if mounted else None
        if mounted is None or name is None:
            raise CgroupError(f"the cgroup {path} of {controller or 'cgroup v2'} can't be seen here")
        directory = mounted.point / name
        if directory in done:
            continue
        done.add(directory)
        try:
            descriptor = os.open(directory / _PROCS, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                os.write(descriptor, str(pid).encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CgroupError(
                f"process {pid} could not be moved into {directory}: {error.strerror}",
                hint="Only root may move it" if isinstance(error, PermissionError) else "",
            ) from error


@cache
def _mounted() -> Mapping[str, Mounted]:
    """Where each controller is, v1's named hierarchies among them. A host's mounts of cgroups don't change."""
    found: dict[str, Mounted] = {}
    for mount in mounts(Path("/proc/self/mountinfo").read_text()):
        place = Mounted(Path(mount.point), mount.root)
        if mount.kind == "cgroup2":
            found[UNIFIED] = place
        elif mount.kind == "cgroup":
            found.update(dict.fromkeys(mount.super_options, place))
    return found
