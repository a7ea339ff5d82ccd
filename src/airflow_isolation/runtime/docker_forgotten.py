"""What is on this host of containers that dockerd has forgotten, and removes no more.

A dockerd that is killed while it starts a container takes it for one that was only created, and removes its record alone.
Shim, cgroups and the process in them stay, and so does what dockerd's containerd knows of it. All of it bears Docker's id
of the container, which nobody else's has and none gets again: what is made meanwhile is never hit.
"""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from airflow_isolation.cgroups import CgroupBusy, CgroupError, SameName, places_of
from airflow_isolation.cgroups.hierarchy import mounts
from airflow_isolation.containerd.errors import ContainerdError, NotFound
from airflow_isolation.runtime.interface import Stray
from airflow_isolation.runtime.shims import shims

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from airflow_isolation.runtime.shims import Shim

logger = logging.getLogger(__name__)

# For the shim of one container to end, and for its processes, and for an answer of dockerd's containerd.
_SECONDS: Final = 10.0
# dockerd's FIFOs lie here where its containerd is the system's, else beside its containerd's socket.
_DOCKERD: Final = Path("/run/docker/containerd")
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def remove_forgotten(docker_ids: Mapping[str, str], *, dry_run: bool) -> Mapping[str, tuple[Stray, ...]]:
    """End and remove it, and tell by our ids what it was; with ``dry_run`` that alone. May be called twice.

    A container of which something can't be removed is logged, and is not in the answer. For root, in the host's pid
    namespace.

    :param docker_ids: Docker's by ours; dockerd has no record of them.
    """
    running = {shim.id: shim for shim in shims()}
    own = {id: running[docker_id] for id, docker_id in docker_ids.items() if docker_id in running}
    # While it lives: its working directory tells of some.
    directories = {id: tuple(_directories(shim)) for id, shim in own.items()}
    # Before the cgroups: the runtime that they have called ends with them, and makes no more.
    deaf = {id for id, shim in own.items() if not dry_run and not shim.end(_SECONDS)}
    names = {name: id for id, docker_id in docker_ids.items() for name in (docker_id, f"docker-{docker_id}.scope")}
    cgroups: dict[str, list[tuple[str, str]]] = {}
    for parent, name in sorted(places_of(names)):
        cgroups.setdefault(names[name], []).append((parent, name))
    found = {}
    for id, docker_id in docker_ids.items():
        shim, places = own.get(id), cgroups.get(id, ())
        try:
            if id in deaf:
                raise CgroupBusy("its shim does not end")
            if not dry_run:
                _remove_cgroups(places)
                _unmount_all(docker_id)
                if shim is not None:
                    _remove_from_daemon(shim, directories[id])
        except (CgroupError, OSError) as error:
            logger.warning("What docker has forgotten of the container %s could not be removed: %s", id, error)
        else:
            found[id] = (
                *([Stray(kind="shim", id=id, detail=f"process {shim.pid}")] if shim is not None else []),
                *(Stray(kind="cgroup", id=id, detail=f"/{parent}/{name}") for parent, name in places),
            )
    return found


def _remove_cgroups(places: Collection[tuple[str, str]]) -> None:
    for parent, name in places:
        with SameName(parent, name) as cgroups:
            cgroups.remove(_SECONDS)


def _remove_from_daemon(shim: Shim, directories: Collection[Path]) -> None:
    """What dockerd and its containerd keep for what they know, of a container that one of them knows no more."""
    # Here, because it takes its time, and is hardly ever needed.
    from airflow_isolation.containerd.api import containers_pb2
    from airflow_isolation.containerd.client import Client

    try:
        with Client(shim.address, namespace=shim.namespace, timeout=_SECONDS, retry_for=_SECONDS) as client:
            client.containers.Delete(containers_pb2.DeleteContainerRequest(id=shim.id))
    except NotFound:
        pass
    except ContainerdError as error:
        logger.warning("Docker's containerd keeps a record of the container %s: %s", shim.id, error)
    for directory in directories:
        # It may be removed by containerd meanwhile, which notices that the shim has ended.
        shutil.rmtree(directory, ignore_errors=True)


def _directories(shim: Shim) -> Iterator[Path]:
    """Those that the daemons have made for the container, each of its name; they need not be there."""
    found = [Path(shim.address).parent / shim.id, _DOCKERD / shim.id]
    with suppress(OSError):
        bundle = shim.bundle.readlink()
        found += [bundle, (bundle / "work").resolve()]
        with suppress(OSError, ValueError, LookupError, TypeError):
            # What runc wrote down.
            found.append(Path(json.loads((bundle / "options.json").read_bytes())["root"]) / shim.namespace / shim.id)
    return (path for path in found if path.is_absolute() and path.name == shim.id)


def _unmount_all(docker_id: str) -> None:
    """What is still mounted in directories that bear the id."""
    mountinfo = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    found = mounts("\n".join(line for line in mountinfo.splitlines() if docker_id in line))
    for point in sorted((mount.point for mount in found), reverse=True):
        if docker_id in point.split("/") and _LIBC.umount2(os.fsencode(point), _MNT_DETACH | _UMOUNT_NOFOLLOW) < 0:
            number = ctypes.get_errno()
            # Not mounted any more: containerd has done it meanwhile.
            if number not in (errno.EINVAL, errno.ENOENT):
                raise OSError(number, f"unmounting {point}: {os.strerror(number)}")
