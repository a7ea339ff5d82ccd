"""Keeps the end of a container's output in a file of limited size.

containerd's shim would copy a container's stdout and stderr into a file without a limit, until the disk is full. So it gets
a FIFO, which a thread of the worker reads. The shim holds a reading end of its own: when the worker dies, later output stays
in the pipe, and when the pipe is full, the writer has to wait.
"""

from __future__ import annotations

import os
import select
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# Bytes of the file. When it is full, its first half is dropped.
LIMIT = 1 << 20

_CHUNK = 1 << 16
_FIFO = "stdio"
_FILE = "output"


def output_file(directory: Path) -> Path:
    """The file with the output of the container that has this directory."""
    return directory / _FILE


def release(directory: Path) -> None:
    """End the reading, in whichever process; also if no shim ever opened the FIFO. The container must have ended.

    May be called twice.
    """
    # A reader sees the end when a writer closes the FIFO, so open and close it. If none reads, or there is no FIFO: success.
    with suppress(OSError):
        os.close(os.open(directory / _FIFO, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))


class KeptOutput:
    """The output of one container, read from ``fifo`` until the shim closes it: at the container's end at the latest.

    The caller has to call ``begin`` or ``close``.

    :raises OSError: ``directory`` can't be written.
    """

    def __init__(self, id: str, directory: Path) -> None:
        self.fifo = directory / _FIFO
        os.mkfifo(self.fifo, 0o600)
        # Open it before the shim opens the other end, because that would wait for this one.
        self._fifo = os.open(self.fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self._file = os.open(output_file(directory), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except BaseException:
            os.close(self._fifo)
            raise
        self._size = 0
        self._thread = threading.Thread(target=self._keep, name=f"output-{id}", daemon=True)

    def begin(self) -> None:
        """Start to read, in a thread that ends with the container."""
        self._thread.start()

    def close(self) -> None:
        """Release everything if it was never begun."""
        os.close(self._fifo)
        os.close(self._file)

    def settle(self, seconds: float) -> None:
        """Wait until all output of an ended container is in the file, ``seconds`` at most."""
        self._thread.join(seconds)

    def _keep(self) -> None:
        poll = select.poll()
        poll.register(self._fifo, select.POLLIN)
        try:
            while True:
                # Before the shim has opened it there is nothing to read, and no end either (pipe_poll in fs/pipe.c).
                poll.poll()
                with suppress(BlockingIOError):
                    chunk = os.read(self._fifo, _CHUNK)
                    if not chunk:
                        return
                    self._append(chunk)
        finally:
            self.close()

    def _append(self, chunk: bytes) -> None:
        # Go on reading even if the disk is full: otherwise the container would wait for us.
        with suppress(OSError):
            if self._size + len(chunk) > LIMIT:
                kept = os.pread(self._file, LIMIT // 2, max(0, self._size - LIMIT // 2))
                os.ftruncate(self._file, 0)
                self._size = os.pwrite(self._file, kept, 0)
            self._size += os.pwrite(self._file, chunk, self._size)
