"""Readers for what a workload sends: like Airflow's, but a workload can neither exhaust nor stop the worker.

Airflow's readers have no bounds: they allocate 4 GiB at once for a frame that announces so much, a frame of empty lists
becomes 70 times as large, and a line without an end is kept whole. Here everything has a limit. Bytes that can't be decoded
end only this workload.

Each reader is called with a readable channel, and returns whether it wants more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow_isolation.bridge import message_size
from airflow_isolation.errors import IsolationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow_isolation.bridge.pipe import Channel

#: Airflow's frames have whole XCom values in them, so this is large.
FRAME_LIMIT = 256 * 1024 * 1024
#: The memory that a decoded frame may take: so many times its length, or so many bytes if that is more. Numbers, text and
#: rows stay below the first bound. A worker that can hold the largest frame can hold the second.
DECODED_MULTIPLE = 8
DECODED_LIMIT = 128 * 1024 * 1024
LINE_LIMIT = 1024 * 1024
_CHUNK = 64 * 1024


class PeerViolation(IsolationError):
    """The workload broke the rules of its channel, and has to end."""


class FrameReader:
    """Reads frames: a big-endian length of four bytes, then a MessagePack body. ``deliver`` gets each body."""

    def __init__(
        self,
        deliver: Callable[[memoryview], None],
        *,
        limit: int = FRAME_LIMIT,
        decoded_limit: int = DECODED_LIMIT,
    ) -> None:
        self._deliver = deliver
        self._limit = limit
        self._decoded_limit = decoded_limit
        self._buffer = bytearray()

    def __call__(self, source: Channel) -> bool:
        """Read what is there.

        :raises PeerViolation: a frame is empty or too large, or would be too large when it is decoded.
        """
        chunk = source.recv(_CHUNK)
        if not chunk:
            return False
        # The buffer grows with what has arrived, never with what a header announces.
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
            # The frame may be large and is not copied; only the beginning of the next one is.
            frame, self._buffer = self._buffer, self._buffer[4 + length :]
            del frame[4 + length :]
            self._refuse_inflation(frame)
            self._deliver(memoryview(frame)[4:])
        return True

    def _refuse_inflation(self, frame: bytearray) -> None:
        if len(frame) * message_size.WORST <= self._decoded_limit:
            return
        limit = max(self._decoded_limit, len(frame) * DECODED_MULTIPLE)
        if message_size.exceeds(frame, limit, start=4):
            raise PeerViolation(
                f"The workload sent a frame of {len(frame)} bytes that would take more than {limit} when it is decoded, "
                f"or has more than {message_size.OBJECT_LIMIT} values",
                hint="Return less from a task, or put it into a file or a bucket: an XCom of very many small or "
                "empty lists and maps costs the worker too much memory",
            )


class LineAllowance:
    """How many lines, and how many bytes of lines, all readers of one workload deliver together. The rest is dropped."""

    def __init__(self, lines: int, size: int, *, spent: Callable[[], object]) -> None:
        """``spent`` is called once, when the first line is dropped."""
        self._lines = lines
        self._size = size
        self._spent = spent
        self.is_spent = False

    def take(self, size: int) -> bool:
        """Count one more line of so many bytes; False when it may not be delivered."""
        if self.is_spent:
            return False
        self._lines -= 1
        self._size -= size
        if self._lines < 0 or self._size < 0:
            self.is_spent = True
            self._spent()
        return not self.is_spent


class LineReader:
    """Reads lines of text. ``deliver`` gets each line without its newline, and at most ``limit`` bytes at a time."""

    def __init__(
        self,
        deliver: Callable[[bytes], None],
        *,
        cut: Callable[[bytes, int], None] | None = None,
        limit: int = LINE_LIMIT,
        pending: bytes = b"",
        allowance: LineAllowance | None = None,
    ) -> None:
        """
        :param cut: is called for a line that is longer than the limit, with its beginning and the number of bytes left out.
            Without ``cut`` such a line is delivered in pieces.
        :param allowance: how much may be delivered in all; None is no bound.
        """  # noqa: D212
        self._allowance = allowance
        self._deliver_line = deliver
        self._cut = cut
        self._limit = limit
        self._buffer = bytearray()
        self._searched = 0
        self._left_out = 0
        if pending:
            self._take(pending)

    def __call__(self, source: Channel) -> bool:
        chunk = source.recv(_CHUNK)
        if not chunk:
            if self._buffer:
                self._deliver(bytes(self._buffer), self._left_out)
                self._buffer.clear()
            return False
        if self._allowance is None or not self._allowance.is_spent:
            self._take(chunk)
        else:
            self._buffer.clear()  # read, so that the writer need not wait, but dropped
        return True

    def _deliver(self, line: bytes, left_out: int = 0) -> None:
        if self._allowance is not None and not self._allowance.take(len(line)):
            return
        if left_out and self._cut is not None:
            self._cut(line, left_out)
        else:
            self._deliver_line(line)

    def _take(self, chunk: bytes) -> None:
        self._buffer += chunk
        start = 0
        while (end := self._buffer.find(b"\n", max(start, self._searched))) >= 0:
            self._take_line(start, end)
            start = end + 1
        del self._buffer[:start]
        if self._cut is not None:
            self._left_out += max(0, len(self._buffer) - self._limit)
            del self._buffer[self._limit :]
        while len(self._buffer) > self._limit:
            self._deliver(bytes(self._buffer[: self._limit]))
            del self._buffer[: self._limit]
        self._searched = len(self._buffer)

    def _take_line(self, start: int, end: int) -> None:
        if self._cut is not None:
            left_out = self._left_out + max(0, end - start - self._limit)
            self._left_out = 0
            self._deliver(bytes(self._buffer[start : min(end, start + self._limit)]), left_out)
            return
        for piece in range(start, max(end, start + 1), self._limit):
            self._deliver(bytes(self._buffer[piece : min(piece + self._limit, end)]))
