"""Whether something looks as if a dead worker, zygote or daemon had left it. A few directories are listed, and nobody is
asked: a wrong guess costs one ``prune``, which decides by better evidence.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_isolation.bridge.held import is_held
from airflow_isolation.bridge.spare import NEWBORN, SPARE_SECONDS
from airflow_isolation.bridge.zygote import failed_lately, seems_dead

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airflow_isolation.runtime.interface import ContainerRuntime


def looks_left_over(runtime: ContainerRuntime, state_dir: Path) -> bool:
    """Directories that nobody holds, spares that are too old, zygotes without a process, cgroups without a directory."""
    # Before the directories, which are made first and go last.
    cgroups = runtime.seen_on_host()
    workloads = list((state_dir / "workloads").glob("*"))
    spares = list((state_dir / "spares").glob("*/*"))
    zygotes = list((state_dir / "zygotes").glob("*"))
    if any(_is_old(path, NEWBORN) and not is_held(path) for path in workloads):
        return True
    if any(_is_left_spare(path) for path in spares) or any(
        _is_old(zygote, NEWBORN) and not failed_lately(zygote) and seems_dead(zygote) for zygote in zygotes
    ):
        return True
    return bool(cgroups - {path.name for path in (*workloads, *spares, *_children(zygotes))})


def _is_left_spare(path: Path) -> bool:
    if path.suffix == ".json":
        return _is_old(path, SPARE_SECONDS)
    waits = path.with_suffix(".json").exists()
    return not waits and _is_old(path, NEWBORN) and not is_held(path.with_suffix(""))


def _children(directories: list[Path]) -> Iterator[Path]:
    for directory in directories:
        with suppress(OSError), os.scandir(directory) as entries:
            yield from (Path(entry.path) for entry in entries)


def _is_old(path: Path, seconds: float) -> bool:
    try:
        return time.time() - path.lstat().st_mtime >= seconds
    except FileNotFoundError:
        return False
