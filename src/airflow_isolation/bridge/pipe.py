"""What carries a workload's output: pipes, as in every other container.

Airflow's supervisor makes sockets, which Linux opens by no path: a program that logs to /dev/stderr or /dev/stdout, as many
images have it, would fail.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from typing_extensions import Self

#: For anyone: a container's user has another uid than the worker, and in a user namespace none that the pipe could be given
#: to. To open it by its path, one must be allowed to trace a process that has it.
_MODE = 0o666


class PipeEnd:
    """One end of a pipe, with as much of a socket as Airflow's supervisor asks for. ``close`` releases it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __repr__(self) -> str:
        return f"<PipeEnd {self._descriptor}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """-1 when it is closed."""
        return self._descriptor

    def setblocking(self, flag: bool) -> None:
        os.set_blocking(self._descriptor, flag)

    def recv(self, size: int) -> bytes:
        """Nothing when all writers are gone.

        :raises BlockingIOError: there is nothing now, and it does not block.
        """
        return os.read(self._descriptor, size)

    def close(self) -> None:
        """May be called twice."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


Channel: TypeAlias = "socket.socket | PipeEnd"


class Open(Protocol):
    """Anything that has a descriptor, which can be handed over."""

    def fileno(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Channels:
    """One side of what connects a supervisor and its workload."""

    requests: socket.socket
    stdout: Channel
    stderr: Channel
    logs: socket.socket

    def in_order(self) -> tuple[Channel, ...]:
        """As the agent awaits their descriptors."""
        return self.requests, self.stdout, self.stderr, self.logs

    def close(self) -> None:
        """May be called twice."""
        for channel in self.in_order():
            channel.close()


def open_channels() -> tuple[Channels, Channels]:
    """The supervisor's side and the workload's. The caller closes both."""
    our_requests, their_requests = socket.socketpair()
    our_logs, their_logs = socket.socketpair()
    our_stdout, their_stdout = _pipe()
    our_stderr, their_stderr = _pipe()
    return (
        Channels(our_requests, our_stdout, our_stderr, our_logs),
        Channels(their_requests, their_stdout, their_stderr, their_logs),
    )


def _pipe() -> tuple[PipeEnd, PipeEnd]:
    reading, writing = os.pipe()
    os.fchmod(writing, _MODE)
    return PipeEnd(reading), PipeEnd(writing)
