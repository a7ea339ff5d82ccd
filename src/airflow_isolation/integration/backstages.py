"""This process's ``Backstage`` (threads for work that no task waits for) for each daemon.

It is made when it is first needed, and closed when the process ends.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import TYPE_CHECKING, Final

from airflow_isolation.bridge.backstage import Backstage
from airflow_isolation.integration.connection import connect

if TYPE_CHECKING:
    from airflow_isolation.settings.effective import ConnectionSettings

#: Executors' processes end without Python's atexit. Their own modules for this run what is registered there.
_EXITS: Final = ("multiprocessing.util", "billiard.util")

_lock = threading.Lock()
_open: dict[tuple[int, ConnectionSettings], Backstage] = {}


def backstage(connection: ConnectionSettings) -> Backstage:
    """The backstage for a daemon. A forked child gets its own."""
    key = (os.getpid(), connection)
    with _lock:
        found = _open.get(key)
        if found is None:
            if not any(pid == os.getpid() for pid, _ in _open):
                # After a fork: those made by the parent belong to the parent, which closes them.
                _open.clear()
                _close_at_exit()
            found = _open[key] = Backstage(connect(connection), state_dir=connection.state_dir)
        return found


def close_all() -> None:
    """Close the backstages of this process. May be called twice."""
    with _lock:
        mine = [_open.pop(key) for key in list(_open) if key[0] == os.getpid()]
    for one in mine:
        one.close()


def _close_at_exit() -> None:
    atexit.register(close_all)
    for name in _EXITS:
        if name in sys.modules:
            sys.modules[name].Finalize(None, close_all, exitpriority=10)
