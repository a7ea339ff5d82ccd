"""One pull of an image at a time, among threads and processes: ``turn``. Standard library only, so any module may use it."""

from __future__ import annotations

import hashlib
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from airflow_isolation.containerd.file_lock import locked

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class LastPull:
    """When the last successful pull of an image began. The lock file of the image holds it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def began(self) -> float:
        """Seconds since the epoch; 0 for never."""
        try:
            return float(os.pread(self._descriptor, 64, 0))
        except ValueError:
            return 0.0

    def record(self, began: float) -> None:
        """Record that a pull succeeded that began at this time."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, repr(began).encode(), 0)


@contextmanager
def turn(directory: Path, key: str, *, end: float) -> Iterator[LastPull]:
    """Wait for the turn for ``key``, and hold it for a block. When a holder dies, the kernel releases its turn.

    The lock is a file in ``directory``, which is made when it is missing; both stay.

    :raises TimeoutError: others had it until ``end``, a time of ``time.monotonic``.
    :raises OSError: the file can't be made; ``filename`` is its path.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"pull-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    with locked(path, end=end) as descriptor:
        yield LastPull(descriptor)
