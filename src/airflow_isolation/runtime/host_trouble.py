"""Failures of the host while a container is made, for which neither the workload nor a setting is the cause."""

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

# Go's words for the two error numbers above.
_FULL_WORDS = ("no space left on device", "disk quota exceeded")

# runc's: each container has a session keyring, which in a user namespace counts as an ordinary user's (keyrings(7)).
_KEYS_WORDS = "unable to create session key"

# Words about containerd's connection to a dead shim, and about a killed runc. Only the daemon reports these.
_KILLED_WORDS = (
    "ttrpc: closed",
    "ttrpc: server closed",
    "signal: killed",
)
# Of runc and containerd: the first process ended between the two. By whom, Docker does not know.
_STOPPED_WORDS = ("cannot start a container that has stopped", "cannot start a stopped process")


@contextmanager
def writing_in(state_dir: Path) -> Iterator[None]:
    """Translate an OSError in this block, which makes files in the state directory.

    :raises HostTrouble: in its place, with what to do.
    """
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
    """The error for a daemon's words (``reason``) about the host's trouble; None for other words. It says ``sentence``.

    ``starting``: a container is being made or started. Only then words about a killed process count as trouble.
    """
    if _KEYS_WORDS in reason:
        return HostTrouble(
            sentence, hint="Raise the sysctls kernel.keys.maxkeys and kernel.keys.maxbytes: each container needs a key"
        )
    if any(words in reason for words in _FULL_WORDS):
        return HostTrouble(sentence, hint=f"Make room on the file system of {daemon}'s data and on that of its state")
    if starting and any(words in reason for words in _STOPPED_WORDS):
        return ContainerKilled(
            sentence,
            hint="Somebody killed the container before it started, or its seccomp profile forbids what that takes",
        )
    if starting and any(words in reason for words in _KILLED_WORDS):
        return ContainerKilled(
            sentence, hint="Somebody killed the container's shim or runc, or the kernel did because memory ran out"
        )
    return None
