"""The end of what a container's first process writes, kept in a file of limited size.

containerd's shim copies a container's stdout and stderr into a file for as long as they come, whatever the disk holds.
So it is given a FIFO, and a thread of the worker reads that. The shim holds a reading end of its own: when the worker
dies, what is written then stays in the pipe, and whoever writes more has to wait.
"""

from __future__ import annotations

import os
import select
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# Bytes of the file. When it is full, its second half becomes its first.
LIMIT = 1 << 20

_CHUNK = 1 << 16
_FIFO = "stdio"
_FILE = "output"


def output_file(directory: Path) -> Path:
    """Where the output of the container with this directory is kept."""
    return directory / _FILE


def release(directory: Path) -> None:
    """End the reading, whoever does it, also where no shim ever opened the FIFO. The container must have ended."""
    # The end that a reader sees is that of a writer. Nobody reads any more, or there is no FIFO: that is success too.
    with suppress(OSError):
        os.close(os.open(directory / _FIFO, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))


class KeptOutput:
    """The output of one container, read from ``fifo`` until the shim has closed it: at the container's end at the latest.

    Whoever makes it calls ``begin`` or ``close``.

    :raises OSError: ``directory`` can't be written.
    """

    def __init__(self, id: str, directory: Path) -> None:
        self.fifo = directory / _FIFO
        os.mkfifo(self.fifo, 0o600)
        # Before the shim opens the other end, which would wait for this one.
        self._fifo = os.open(self.fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self._file = os.open(output_file(directory), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except BaseException:
            os.close(self._fifo)
            raise
        self._size = 0
        self._thread = threading.Thread(target=self._keep, name=f"output-{id}", daemon=True)

    def begin(self) -> None:
        """Read from now on, in a thread that ends with the container."""
        self._thread.start()

    def close(self) -> None:
        """Give up what was never begun."""
        os.close(self._fifo)
        os.close(self._file)

    def settle(self, seconds: float) -> None:
        """Wait until all that an ended container has written is in the file; ``seconds`` at most."""
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
        # A full disk is no reason to stop reading: the container would wait for us.
        with suppress(OSError):
            if self._size + len(chunk) > LIMIT:
                kept = os.pread(self._file, LIMIT // 2, max(0, self._size - LIMIT // 2))
                os.ftruncate(self._file, 0)
                self._size = os.pwrite(self._file, kept, 0)
            self._size += os.pwrite(self._file, chunk, self._size)
