"""A mount's source on the host's disk: that it exists, that no part of its path is a symbolic link, and its identity."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_isolation.errors import SpecRefused

if TYPE_CHECKING:
    from collections.abc import Iterable

    from airflow_isolation.container_spec import Mount


def identify_sources(mounts: Iterable[Mount]) -> tuple[str, ...]:
    """Device and inode of each bind mount's source: they tell it from another file or directory at the same path.

    Nothing else can get the same two while the source is mounted somewhere, deleted or not.

    :raises OSError: a source is gone.
    """
    found = (Path(mount.source).stat() for mount in mounts if mount.kind == "bind")
    return tuple(f"{source.st_dev}:{source.st_ino}" for source in found)


def check_mount_source_on_disk(source: str) -> None:
    """Walk ``source`` from the root, component by component, without following a link.

    A link is refused even if it leads to a harmless place: it may lead elsewhere before the runtime mounts it
    (CVE-2021-30465). The same race remains if somebody may rename a directory in the path; sources belong under
    directories that only the administrator can change.

    :raises SpecRefused: it is missing, a component is a link or not a directory, or this user may not look at it.
    """
    here = os.open("/", os.O_PATH | os.O_DIRECTORY)
    try:
        walked = ""
        for component in source.strip("/").split("/"):
            if not component:
                continue
            walked += f"/{component}"
            below = _open(component, here, walked, source)
            os.close(here)
            here = below
            if stat.S_ISLNK(os.fstat(here).st_mode):
                target = os.readlink("", dir_fd=here)
                where = "it" if walked == source else f"its part {walked!r}"
                raise SpecRefused(
                    f"mount source {source!r} can't be used: {where} is a symbolic link to {target!r}",
                    hint="Write the path that the link leads to",
                )
    finally:
        os.close(here)


def _open(component: str, directory: int, walked: str, source: str) -> int:
    try:
        return os.open(component, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        missing = "does not exist" if walked == source else f"does not exist: there is no {walked!r}"
        raise SpecRefused(
            f"mount source {source!r} {missing}", hint="Make it on this host, or correct the path"
        ) from None
    except OSError as error:
        raise SpecRefused(f"mount source {source!r} can't be used: {walked!r}: {error.strerror}") from error
