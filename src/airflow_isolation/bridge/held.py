"""Holds a directory by a lock: as long as the holder lives, the directory is not taken for a left-over."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def held(directory: Path, *, alone: bool = False) -> Iterator[None]:
    """Hold a workload's directory for a block, shared with others unless ``alone``.

    When this process dies, the kernel unlocks it.

    :raises BlockingIOError: another holder has it, and one of the two wants it ``alone``.
    :raises OSError: the directory does not exist.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_NB | (fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
        yield
    finally:
        os.close(descriptor)


def is_held(directory: Path) -> bool:
    """Whether the directory is held; False when it does not exist."""
    try:
        with held(directory, alone=True):
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False
