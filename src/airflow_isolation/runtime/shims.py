"""containerd's shims among the processes of this host: each says on its command line whose container it has.

dockerd's containers have them too, with Docker's own id.
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
    """``address`` is the socket of its containerd; ``started`` tells its pid from a reused one."""

    pid: int
    started: int
    id: str
    namespace: str
    address: str

    @property
    def bundle(self) -> Path:
        """The directory in which containerd has put what its container is to be."""
        return _PROC / str(self.pid) / "cwd"

    def is_of(self, socket_path: str, namespace: str) -> bool:
        """Whether it belongs to a namespace of the containerd at a socket, by whichever name that is known."""
        if self.namespace != namespace:
            return False
        return self.address == socket_path or os.path.realpath(self.address) == os.path.realpath(socket_path)

    def end(self, seconds: float) -> bool:
        """Kill it, and whether it is gone within so many seconds. Gone already is success."""
        try:
            held = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        try:
            # Held, the number can't be given to another process: now it is sure whose it is.
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
    """Those of this host, as far as they are in our pid namespace."""
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
            return None  # no shim, but a moment's work of its containerd
        # A command line can say anything, and a container may have a program of that name.
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
