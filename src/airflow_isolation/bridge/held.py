"""Holding a directory: while its holder lives, nobody takes it for a left-over."""

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
    """Hold a workload's directory, with others; the kernel lets go when this process dies, however it dies.

    :raises BlockingIOError: ``alone`` was asked for, and somebody holds it, or the reverse.
    :raises OSError: it is not there.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_NB | (fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
        yield
    finally:
        os.close(descriptor)


def is_held(directory: Path) -> bool:
    """Whether somebody holds it; nobody holds what is not there."""
    try:
        with held(directory, alone=True):
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False
