"""Readers for what a workload sends: like Airflow's, but nothing that a peer writes can exhaust or stop the worker.

Airflow's readers take any length: a frame that announces 4 GiB is allocated at once, a line without an end is kept
whole. Here both have limits, and bytes that can't be decoded end that workload and no other.

Each reader is called with a readable socket and answers whether it wants more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow_isolation.errors import IsolationError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

#: Airflow's frames carry whole XCom values, so this is generous.
FRAME_LIMIT = 256 * 1024 * 1024
LINE_LIMIT = 1024 * 1024
_CHUNK = 64 * 1024


class PeerViolation(IsolationError):
    """The workload sent what its channel does not allow; it has to end."""


class FrameReader:
    """Frames of a four-byte big-endian length and a body. ``deliver`` gets each body."""

    def __init__(self, deliver: Callable[[bytearray], None], *, limit: int = FRAME_LIMIT) -> None:
        self._deliver = deliver
        self._limit = limit
        self._buffer = bytearray()

    def __call__(self, source: socket.socket) -> bool:
        """:raises PeerViolation: a frame is empty or larger than the limit."""
        chunk = source.recv(_CHUNK)
        if not chunk:
            return False
        # The buffer grows with what has arrived, never with what a header promises.
        self._buffer += chunk
        while len(self._buffer) >= 4:
            length = int.from_bytes(self._buffer[:4], "big")
            if not 0 < length <= self._limit:
                raise PeerViolation(
                    f"The workload announced a frame of {length} bytes; 1 to {self._limit} are allowed",
                    hint="User code must not write to descriptor 0",
                )
            if len(self._buffer) < 4 + length:
                break
            body = self._buffer[4 : 4 + length]
            del self._buffer[: 4 + length]
            self._deliver(body)
        return True


class LineReader:
    """Lines of text. ``deliver`` gets each without its newline; a longer one than ``limit`` bytes arrives in pieces."""

    def __init__(self, deliver: Callable[[bytes], None], *, limit: int = LINE_LIMIT, pending: bytes = b"") -> None:
        self._deliver = deliver
        self._limit = limit
        self._buffer = bytearray()
        self._searched = 0
        if pending:
            self._take(pending)

    def __call__(self, source: socket.socket) -> bool:
        chunk = source.recv(_CHUNK)
        if not chunk:
            if self._buffer:
                self._deliver(bytes(self._buffer))
                self._buffer.clear()
            return False
        self._take(chunk)
        return True

    def _take(self, chunk: bytes) -> None:
        self._buffer += chunk
        start = 0
        while (end := self._buffer.find(b"\n", max(start, self._searched))) >= 0:
            for piece in range(start, max(end, start + 1), self._limit):
                self._deliver(bytes(self._buffer[piece : min(piece + self._limit, end)]))
            start = end + 1
        del self._buffer[:start]
        while len(self._buffer) > self._limit:
            self._deliver(bytes(self._buffer[: self._limit]))
            del self._buffer[: self._limit]
        self._searched = len(self._buffer)
