"""Pipes for a workload's output, as in every other container.

Airflow's supervisor makes sockets. Linux can't open a socket by a path, so programs that log to /dev/stderr or /dev/stdout,
as in many images, would fail.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from typing_extensions import Self

#: Any user may write: a container's user has another uid than the worker, and in a user namespace it may have no uid to
#: which the pipe could be given. Opening it by its path needs the right to trace a process that has it open.
_MODE = 0o666


class PipeEnd:
    """One end of a pipe, with the methods of a socket that Airflow's supervisor calls. ``close`` releases it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __repr__(self) -> str:
        return f"<PipeEnd {self._descriptor}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor; -1 when it is closed."""
        return self._descriptor

    def setblocking(self, flag: bool) -> None:
        os.set_blocking(self._descriptor, flag)

    def recv(self, size: int) -> bytes:
        """The next bytes; empty when all writers are gone.

        :raises BlockingIOError: there is nothing now, and the end does not block.
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
    """One side of the four channels between a supervisor and its workload."""

    requests: socket.socket
    stdout: Channel
    stderr: Channel
    logs: socket.socket

    def in_order(self) -> tuple[Channel, ...]:
        """The channels in the order in which the agent expects their descriptors."""
        return self.requests, self.stdout, self.stderr, self.logs

    def close(self) -> None:
        """May be called twice."""
        for channel in self.in_order():
            channel.close()


def open_channels() -> tuple[Channels, Channels]:
    """Make the channels: the supervisor's side and the workload's. The caller closes both."""
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
