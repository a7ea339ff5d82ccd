"""One pull for many callers: threads and processes that want the same image at the same time."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from airflow_isolation.errors import ImagePullFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_PAUSE_SECONDS = 0.05
_DONE = b"pulled"


def pull_once(state_dir: Path, reference: str, pull: Callable[[float], None], *, timeout: float) -> None:
    """Call ``pull`` with the seconds left, unless another caller's pull succeeded while we waited for it.

    The lock is a file in ``state_dir`` that is unlinked with the pull's end; nothing stays.

    :raises ImagePullFailed: the others' pulls took longer than ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    path = state_dir / f"pull-{hashlib.sha256(reference.encode()).hexdigest()[:32]}.lock"
    while time.monotonic() < deadline:
        with _opened(path) as lock:
            _acquire(lock, deadline, reference)
            if os.pread(lock, len(_DONE), 0) == _DONE:
                return
            if not _is_current(lock, path):
                # Its holder failed and unlinked it: whoever comes first to a new file tries again.
                continue
            try:
                pull(max(deadline - time.monotonic(), _PAUSE_SECONDS))
                os.pwrite(lock, _DONE, 0)
                return
            finally:
                path.unlink(missing_ok=True)
    raise _too_long(reference)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield lock
    finally:
        os.close(lock)


def _acquire(lock: int, deadline: float, reference: str) -> None:
    # flock belongs to the open file, so it also keeps threads of one process apart; it has no timeout of its own.
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise _too_long(reference) from None
            time.sleep(_PAUSE_SECONDS)
        else:
            return


def _is_current(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False


def _too_long(reference: str) -> ImagePullFailed:
    return ImagePullFailed(
        f"another process has been pulling {reference} for too long", hint="Look at the network and the registry"
    )
