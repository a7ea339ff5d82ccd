"""Slots for fresh starts: how many workloads that could not be forked may import Airflow at the same time, one for each
core.

When a zygote dies, all workloads that were about to be forked would start fresh at once, and leave the next zygote hardly
any processor time. A slot is a locked file in ``<state_dir>/fresh``. When a holder dies, the kernel releases its slot.
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
    """Wait for a slot; the caller closes what this returns, which gives the slot back. It may be closed twice.

    At ``end``, a time of ``time.monotonic``, without a slot it returns an empty one, so that the workload starts anyway: slower,
    but it doesn't fail. None when ``unless`` became true first.

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
            log.warning("A workload starts fresh beside others: no slot became free in time")
            return ExitStack()
        time.sleep(_PAUSE_SECONDS)


def _taken(path: Path) -> ExitStack | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with ExitStack() as taken:
        taken.callback(os.close, descriptor)
        try:
            # The lock belongs to the open file, not to the process, so threads of one process wait for each other too.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        return taken.pop_all()
