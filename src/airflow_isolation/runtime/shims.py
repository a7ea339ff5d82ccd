"""Finds containerd's shims among the processes of this host. The command line of a shim names its container.

A shim is the process that containerd keeps beside each container. dockerd's containers have shims too, with Docker's own id.
"""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_PROGRAM: Final = "containerd-shim"
_PROC: Final = Path("/proc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shim:
    """A shim. ``address`` is the socket of its containerd; ``started`` tells its pid from a reused one."""

    pid: int
    started: int
    id: str
    namespace: str
    address: str

    @property
    def bundle(self) -> Path:
        """The directory with the container's runtime-spec, which containerd made."""
        return _PROC / str(self.pid) / "cwd"

    def is_of(self, socket_path: str, namespace: str) -> bool:
        """Whether it belongs to a namespace of the containerd at this socket, whichever path the shim has for the socket."""
        if self.namespace != namespace:
            return False
        return self.address == socket_path or os.path.realpath(self.address) == os.path.realpath(socket_path)

    def end(self, seconds: float) -> bool:
        """Kill it; True when it is gone within so many seconds, or already. May be called twice."""
        try:
            held = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        try:
            # While the pidfd is open, the kernel gives the pid to no other process. Check now that it is the shim.
            if _shim(self.pid) != self:
                return True
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(held, signal.SIGKILL)
            poll = select.poll()
            poll.register(held, select.POLLIN)
            return bool(poll.poll(seconds * 1000))
        finally:
            os.close(held)


def shims() -> Iterator[Shim]:
    """The shims of this host that are in our pid namespace."""
    for entry in _PROC.iterdir():
        if entry.name.isdecimal() and (shim := _shim(int(entry.name))) is not None:
            yield shim


def _shim(pid: int) -> Shim | None:
    process = _PROC / str(pid)
    try:
        program, *arguments = (process / "cmdline").read_bytes().decode(errors="surrogateescape").split("\0")[:-1]
        if not Path(program).name.startswith(_PROGRAM):
            return None
        if arguments[-1:] in (["start"], ["delete"]):
            return None  # a short-lived helper of containerd with the same program, no shim
        # A command line can say anything, and a program in a container may have this name.
        if process.stat().st_uid not in (0, os.geteuid()) or not _is_in_our_pid_namespace(process):
            return None
        if not (process / "exe").readlink().name.startswith(_PROGRAM):
            return None
        started = int((process / "stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError):
        return None
    said = {
        name.lstrip("-"): value
        for name, value in pairwise(arguments)
        if name.lstrip("-") in {"id", "namespace", "address"}
    }
    try:
        return Shim(pid=pid, started=started, **said)
    except TypeError:
        return None


def _is_in_our_pid_namespace(process: Path) -> bool:
    return (process / "ns/pid").stat().st_ino == (_PROC / "self/ns/pid").stat().st_ino
