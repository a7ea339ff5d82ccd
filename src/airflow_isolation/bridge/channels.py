"""Readers for what a workload sends: like Airflow's, but nothing that a peer writes can exhaust or stop the worker.

Airflow's readers take any length: a frame that announces 4 GiB is allocated at once, a line without an end is kept
whole. Here both have limits, and bytes that can't be decoded end that workload and no other.

Each reader is called with a readable channel and answers whether it wants more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow_isolation.errors import IsolationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow_isolation.bridge.pipe import Channel

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

    def __call__(self, source: Channel) -> bool:
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


class LineAllowance:
    """How many lines, and how many bytes of them, the readers of one workload deliver together. The rest is left out."""

    def __init__(self, lines: int, size: int, *, spent: Callable[[], object]) -> None:
        """``spent`` is called once, when something is left out."""
        self._lines = lines
        self._size = size
        self._spent = spent
        self.is_spent = False

    def take(self, size: int) -> bool:
        """Whether one more line, of so many bytes, may be delivered."""
        if self.is_spent:
            return False
        self._lines -= 1
        self._size -= size
        if self._lines < 0 or self._size < 0:
            self.is_spent = True
            self._spent()
        return not self.is_spent


class LineReader:
    """Lines of text. ``deliver`` gets each without its newline; a longer one than ``limit`` bytes arrives in pieces."""

    def __init__(
        self,
        deliver: Callable[[bytes], None],
        *,
        limit: int = LINE_LIMIT,
        pending: bytes = b"",
        allowance: LineAllowance | None = None,
    ) -> None:
        """:param allowance: what may be delivered in all; without one, there is no end to it."""
        self._allowance = allowance
        self._deliver_line = deliver
        self._limit = limit
        self._buffer = bytearray()
        self._searched = 0
        if pending:
            self._take(pending)

    def __call__(self, source: Channel) -> bool:
        chunk = source.recv(_CHUNK)
        if not chunk:
            if self._buffer:
                self._deliver(bytes(self._buffer))
                self._buffer.clear()
            return False
        if self._allowance is None or not self._allowance.is_spent:
            self._take(chunk)
        else:
            self._buffer.clear()  # read, so that who writes need not wait, and not even looked at
        return True

    def _deliver(self, line: bytes) -> None:
        if self._allowance is None or self._allowance.take(len(line)):
            self._deliver_line(line)

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
