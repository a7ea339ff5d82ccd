"""Short addresses for unix sockets: an address has at most 107 bytes (unix(7)), but paths may be longer."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def address_of(path: Path) -> Iterator[str]:
    """A short name for ``path``, through a descriptor of its directory, to bind or connect to. Valid until the block ends.

    :raises OSError: there is no such directory.
    """
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
