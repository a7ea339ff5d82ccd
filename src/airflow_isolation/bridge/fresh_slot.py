"""How many workloads of this host may import Airflow for themselves at a time because they could not be forked: one a core.

When a zygote dies, everybody who was about to be forked would do so, and the next zygote would get what little of the
processor they leave. A slot is a locked file in ``<state_dir>/fresh``; the kernel gives a dead holder's back.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import structlog

from airflow_isolation.runtime.host_trouble import writing_in

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = structlog.get_logger(logger_name="airflow_isolation.workload")

_PAUSE_SECONDS = 0.1


def await_slot(
    state_dir: Path, *, end: float, unless: Callable[[], bool] | None = None, slots: int = 0
) -> ExitStack | None:
    """Wait for a slot, which is given back when what this gives is closed; it may be closed twice.

    At ``end``, a time of ``time.monotonic``, it gives nothing that anybody waits for, and the workload starts all the same:
    slower, never failed. None when ``unless`` has come true first.

    :param slots: how many there are; by default one for each core that this process may use.
    :raises HostTrouble: the files can't be made.
    """
    directory = state_dir / "fresh"
    with writing_in(state_dir):
        directory.mkdir(mode=0o700, exist_ok=True)
    while True:
        for number in range(slots or len(os.sched_getaffinity(0))):
            with writing_in(state_dir):
                held = _taken(directory / str(number))
            if held is not None:
                return held
        if unless is not None and unless():
            return None
        if time.monotonic() >= end:
            log.warning("A workload starts fresh although others do: none of them was done in time")
            return ExitStack()
        time.sleep(_PAUSE_SECONDS)


def _taken(path: Path) -> ExitStack | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with ExitStack() as taken:
        taken.callback(os.close, descriptor)
        try:
            # Of each open file its own, so threads of one process wait for each other too.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        return taken.pop_all()
