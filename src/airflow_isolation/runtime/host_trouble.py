"""What fails on the host while a container is made, and is neither the workload's fault nor a setting's."""

from __future__ import annotations

import errno
from contextlib import contextmanager
from typing import TYPE_CHECKING

from airflow_isolation.errors import ContainerFailed, ContainerKilled, HostTrouble

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)

# What Go's runtime prints for the two above.
_FULL_WORDS = ("no space left on device", "disk quota exceeded")

# Of containerd's connection to a shim that died, and of runc, which was killed. Ours are told by the daemon alone.
_KILLED_WORDS = (
    "ttrpc: closed",
    "ttrpc: server closed",
    "signal: killed",
)
# Of runc and containerd: the first process ended between the two. By whom, Docker does not know.
_STOPPED_WORDS = ("cannot start a container that has stopped", "cannot start a stopped process")


@contextmanager
def writing_in(state_dir: Path) -> Iterator[None]:
    """:raises HostTrouble: an OSError left this block, in which files of the state directory are made."""
    try:
        yield
    except OSError as error:
        hint = ""
        if error.errno in _FULL:
            hint = "Make room on its file system, or set [container_runtime] state_dir to a place on another"
        elif error.errno in _CLOSED:
            hint = "Set [container_runtime] state_dir to a place where the worker's user may write"
        raise HostTrouble(f"The worker can't write in its state directory {state_dir}: {error}", hint=hint) from error


def told_by_daemon(daemon: str, sentence: str, reason: str, *, starting: bool = True) -> ContainerFailed | None:
    """The trouble that a daemon's words tell of, or None for other words. ``sentence`` says what failed, with them.

    Of one that was killed it is told only while a container is made or started: ``starting``.
    """
    if any(words in reason for words in _FULL_WORDS):
        return HostTrouble(sentence, hint=f"Make room on the file system of {daemon}'s data and on that of its state")
    if starting and any(words in reason for words in _STOPPED_WORDS):
        return ContainerKilled(
            sentence,
            hint="Somebody killed the container before it started, or its seccomp profile forbids what that takes",
        )
    if starting and any(words in reason for words in _KILLED_WORDS):
        return ContainerKilled(
            sentence, hint="Somebody killed the container's shim or runc, or the kernel did for want of memory"
        )
    return None
