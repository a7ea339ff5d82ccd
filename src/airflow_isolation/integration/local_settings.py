"""What Airflow imports at its start besides itself: airflow_local_settings and the plugins, as they are now."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

from airflow_isolation.integration.workload_environment import administrators_directories

if TYPE_CHECKING:
    from collections.abc import Iterator

log = structlog.get_logger(logger_name="airflow_isolation.local_settings")

#: Endings of the files by which airflow_local_settings and plugins are compared.
SETTINGS_FILES: Final = (".py", ".yaml", ".yml", ".json", ".toml", ".ini", ".cfg")

#: How many files and directories are looked at, which takes some 50 ms.
MOST_FILES: Final = 10_000


def local_settings_digest() -> str:
    """A digest of airflow_local_settings and the plugins: a zygote may have imported both with Airflow.

    Files below their directories count too, because they may import or read them. The digest is computed once in a process,
    as stock Airflow imports them once: a later change takes effect after a restart.
    """
    return _digest(tuple(administrators_directories()))


@cache
def _digest(directories: tuple[Path, ...]) -> str:
    files = list(islice(_settings_files(directories), MOST_FILES + 1))
    if len(files) > MOST_FILES:
        log.warning(
            "There are more files of local settings and plugins than are looked at: after a change in one of the others, "
            "running zygotes still have the old version",
            directories=[str(directory) for directory in directories],
            looked_at=MOST_FILES,
        )
    return hashlib.sha256(repr(files).encode()).hexdigest()


def _settings_files(directories: tuple[Path, ...]) -> Iterator[tuple[str, int, int, int]]:
    """The files below these directories. Links are followed, as Python does, and no directory is entered twice."""
    entered: set[tuple[int, int]] = set()
    for top in directories:
        for directory, names, files in os.walk(top, followlinks=True):
            with suppress(OSError):  # gone meanwhile
                status = Path(directory).stat()
                if (status.st_dev, status.st_ino) in entered:
                    names.clear()
                    continue
                entered.add((status.st_dev, status.st_ino))
            yield directory, 0, 0, 0
            # Sorted, so that directories are always walked in the same order.
            names[:] = sorted(name for name in names if not name.startswith((".", "__pycache__")))
            for file in sorted(Path(directory, name) for name in files if name.endswith(SETTINGS_FILES)):
                with suppress(OSError):  # gone, or a link that leads nowhere
                    found = file.stat()
                    yield str(file), found.st_mtime_ns, found.st_size, found.st_ino
