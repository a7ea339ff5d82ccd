"""One pull of an image at a time, among threads and processes: ``turn``. Standard library only, so anybody may use it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PAUSE_SECONDS = 0.05


class LastPull:
    """When the last pull of an image began, kept in the file that also is its lock."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def began(self) -> float:
        """Seconds since the epoch; 0 for never."""
        try:
            return float(os.pread(self._descriptor, 64, 0))
        except ValueError:
            return 0.0

    def record(self, began: float) -> None:
        """Say that a pull that began then has succeeded."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, repr(began).encode(), 0)


@contextmanager
def turn(directory: Path, key: str, *, end: float) -> Iterator[LastPull]:
    """Wait until nobody else has the turn for ``key``. The kernel gives a dead process's turn to the next.

    The lock is a file in ``directory``, which is made when it is missing; both stay.

    :raises TimeoutError: others had it until ``end``, a time of ``time.monotonic``.
    :raises OSError: the file can't be made; ``filename`` is its path.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"pull-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                # Of each open file its own, so threads of one process wait for each other too.
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise TimeoutError(f"somebody else has held {path} all the time") from None
            time.sleep(_PAUSE_SECONDS)
        yield LastPull(descriptor)
    finally:
        os.close(descriptor)
