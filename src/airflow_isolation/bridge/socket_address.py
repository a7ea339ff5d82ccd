"""Addresses of unix sockets, which have 107 bytes at most (unix(7)), where paths may be longer."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def address_of(path: Path) -> Iterator[str]:
    """A short name of ``path``, by way of its directory's descriptor; to bind or connect to while the block runs.

    :raises OSError: there is no such directory.
    """
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
