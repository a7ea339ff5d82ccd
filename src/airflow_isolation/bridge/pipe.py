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
    from _typeshed import ReadableBuffer
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


class Requests(socket.socket):
    """One end of what carries requests and answers. The supervisor's knows of a workload that never read its work.

    What the workload is to do is the first that it is sent; all else answers a request. When a socket is closed in which
    something has not been read, the kernel says so to the other side (net/unix/af_unix.c, unix_release_sock): it is reset.
    To be read by ``recv`` alone.
    """

    _heard = False
    _lost = False

    @property
    def was_never_read(self) -> bool:
        """Whether it is certain that the workload ended without having read its work to the end.

        Never before all that came from there has been read, up to the end or an error.
        """
        return self._lost and not self._heard

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        try:
            chunk = super().recv(size, flags)
        except ConnectionResetError:
            self._lost = True
            raise
        self._heard = self._heard or bool(chunk)
        return chunk

    def sendall(self, data: ReadableBuffer, flags: int = 0, /) -> None:
        try:
            super().sendall(data, flags)
        except (BrokenPipeError, ConnectionResetError):
            self._lost = True  # some of it at least nobody will read
            raise


Channel: TypeAlias = "socket.socket | PipeEnd"


class Open(Protocol):
    """Anything that has a descriptor, which can be handed over."""

    def fileno(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Channels:
    """One side of the four channels between a supervisor and its workload."""

    requests: Requests
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
    our_requests, their_requests = (Requests(fileno=end.detach()) for end in socket.socketpair())
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
