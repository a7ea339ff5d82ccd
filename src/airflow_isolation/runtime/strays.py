"""What is on this host of containers that their daemon has no record of: nobody else would ever find it.

A daemon or a worker that is killed while a container is made leaves its cgroups in every hierarchy, the runtime's own
process that waits in them for ever, and a shim; and a daemon that is started anew forgets what it had not finished.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from airflow_isolation.cgroups import CgroupError, SameName
from airflow_isolation.oci import is_container_id
from airflow_isolation.runtime.interface import Stray
from airflow_isolation.runtime.kept_output import release
from airflow_isolation.runtime.shims import shims

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

    from airflow_isolation.cgroups.tree import Workload
    from airflow_isolation.runtime.placement import Placements
    from airflow_isolation.runtime.shims import Shim

logger = logging.getLogger(__name__)

# For the processes of one container to end.
_SECONDS = 10.0
# Between a container's directory and its shim there are milliseconds; who is in another namespace has no record here.
_NEWBORN = 10.0


def remove_strays(
    placements: Placements,
    parents: Collection[str],
    *,
    files: Path,
    is_ours: Callable[[Shim], bool],
    recorded: Callable[[], Collection[str]],
    dry_run: bool,
) -> tuple[Stray, ...]:
    """End and remove them, and tell what they were; with ``dry_run`` that alone. What can't be removed is logged.

    ``files``: the directory of the containers' own. ``is_ours``: whether a shim belongs to the daemon. ``recorded``: the
    ids of which that has a record now.
    """
    named = {(id, parent) for parent in parents for id in placements.ids(parent)}
    made = {path.name: path for path in _directories(files) if is_container_id(path.name)}
    known = recorded()
    with ExitStack() as opened:
        # From here on it is this cgroup, whatever is made at its path meanwhile: a worker may use an id a second time.
        cgroups: dict[str, list[SameName | Workload]] = {}
        for id, parent in sorted(named):
            if id not in known:
                found = placements.open_all(id, parent)
                for cgroup in found:
                    opened.callback(cgroup.close)
                cgroups.setdefault(id, []).extend(found)
        # After the cgroups: whose container is just being made has its shim by now.
        running = tuple(shims())
        own = {shim.id: shim for shim in running if is_ours(shim) and is_container_id(shim.id)}
        others = {shim.id for shim in running} - own.keys()
        suspects = (cgroups.keys() | own.keys() | made.keys()) - set(known)
        # What was there before and has no record now is nobody's: the record is made first and deleted last.
        suspects -= set(recorded()) if suspects else set()
        strays: list[Stray] = []
        for id in sorted(suspects):
            try:
                strays += _removed(id, cgroups.get(id, ()), own.get(id), made.get(id), others=others, dry_run=dry_run)
            except (CgroupError, OSError) as error:
                logger.warning("What is left of the container %s could not be removed: %s", id, error)
        return tuple(strays)


def _removed(
    id: str,
    cgroups: Collection[SameName | Workload],
    shim: Shim | None,
    files: Path | None,
    *,
    others: Collection[str],
    dry_run: bool,
) -> Iterator[Stray]:
    # On cgroup v2 two daemons may share our directories, and dockerd has an id of its own for what is below them.
    if not {id, *(name for cgroup in cgroups for name in _below(cgroup))}.isdisjoint(others):
        return
    if shim is not None:
        # First: the runtime that it has called ends with it, and makes no more cgroups.
        if not dry_run and not shim.end(_SECONDS):
            raise CgroupError(f"its shim, process {shim.pid}, does not end")
        yield Stray(kind="shim", id=id, detail=f"process {shim.pid}")
    for cgroup in cgroups:
        if not dry_run:
            cgroup.remove(_SECONDS)
        yield Stray(kind="cgroup", id=id)
    if files is not None:
        if not dry_run:
            release(files)
            shutil.rmtree(files)
        yield Stray(kind="directory", id=id, detail=str(files))


def _below(cgroup: SameName | Workload) -> Collection[str]:
    with suppress(CgroupError):
        return cgroup.below() if isinstance(cgroup, SameName) else cgroup.cgroup.children()
    return ()


def _directories(parent: Path) -> Iterator[Path]:
    with suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            with suppress(OSError):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime >= _NEWBORN:
                    yield parent / entry.name
