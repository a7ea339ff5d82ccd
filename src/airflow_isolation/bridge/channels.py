"""Readers for what a workload sends: like Airflow's, but nothing that a peer writes can exhaust or stop the worker.

Airflow's readers take any length: a frame that announces 4 GiB is allocated at once, and a frame of empty lists becomes
70 times as much, a line without an end is kept whole. Here all have limits, and bytes that can't be decoded end that
workload and no other.

Each reader is called with a readable channel and answers whether it wants more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow_isolation.bridge import message_size
from airflow_isolation.errors import IsolationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow_isolation.bridge.pipe import Channel

#: Airflow's frames carry whole XCom values, so this is generous.
FRAME_LIMIT = 256 * 1024 * 1024
#: What a frame may take when it is decoded: so many times its length, or so many bytes if that is more. Numbers, text and
#: rows stay below the first. A worker that can take a frame can take the second.
DECODED_MULTIPLE = 8
DECODED_LIMIT = 128 * 1024 * 1024
LINE_LIMIT = 1024 * 1024
_CHUNK = 64 * 1024


class PeerViolation(IsolationError):
    """The workload sent what its channel does not allow; it has to end."""


class FrameReader:
    """Frames of a four-byte big-endian length and a body, a MessagePack. ``deliver`` gets each body."""

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
        """:raises PeerViolation: a frame is empty, larger than the limit, or would be when it is decoded."""
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
            # Not the frame is copied, which may be large, but what has come of the next one.
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
    """Lines of text. ``deliver`` gets each without its newline, and no more than ``limit`` bytes at a time."""

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
        :param cut: gets the beginning of a line that is longer than the limit, and how many bytes of it are left out.
            Without it such a line is delivered in pieces.
        :param allowance: what may be delivered in all; without one, there is no end to it.
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
            self._buffer.clear()  # read, so that who writes need not wait, and not even looked at
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
