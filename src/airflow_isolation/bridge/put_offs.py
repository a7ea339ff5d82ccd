"""How often a try has been put off because the infrastructure failed; the tries' own reschedules don't count.

Airflow counts all reschedules of a try together, and a sensor has many of its own. So each try that was put off on this host
has a file in ``<state_dir>/put-off``, named after it, with one byte for each time. Old files go when another is written.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

#: After so many seconds without another time, the earlier ones are forgotten.
FORGET_AFTER = 86400.0


def count_put_off(state_dir: Path, id: str) -> int | None:
    """How often this try has been put off before, on this host; this time is counted. None when it can't be written down."""
    directory = state_dir / "put-off"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        _forget_old(directory)
        with (directory / id).open("ab", buffering=0) as file:
            before = file.tell()
            file.write(b".")
    except OSError:
        return None  # a full disk may be what it is put off for
    return before


def _forget_old(directory: Path) -> None:
    now = time.time()
    for file in directory.iterdir():
        with suppress(FileNotFoundError):
            if now - file.stat().st_mtime > FORGET_AFTER:
                file.unlink(missing_ok=True)
