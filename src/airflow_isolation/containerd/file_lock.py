"""A lock among threads and processes. When a holder dies, the kernel releases its lock. Standard library only."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_PAUSE_SECONDS = 0.05


@contextmanager
def locked(path: str | os.PathLike[str], *, end: float, shared: bool = False) -> Iterator[int]:
    """Lock the file at ``path`` for a block; yields its descriptor. A missing file is made, and stays.

    ``shared``: together with all other holders that ask for a shared lock.

    :raises TimeoutError: others held it until ``end``, a time of ``time.monotonic``.
    :raises OSError: the file can't be made.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        lock(descriptor, end=end, what=os.fspath(path), shared=shared)
        yield descriptor
    finally:
        os.close(descriptor)


def lock(descriptor: int, *, end: float, what: str, shared: bool = False) -> None:
    """Lock an open file or directory. Closing it unlocks it.

    :raises TimeoutError: others held it until ``end``, a time of ``time.monotonic``; ``what`` names it.
    """
    while True:
        try:
            # The lock belongs to the open file, not to the process, so threads of one process wait for each other too.
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= end:
                raise TimeoutError(f"somebody else has held {what} all the time") from None
        time.sleep(_PAUSE_SECONDS)
