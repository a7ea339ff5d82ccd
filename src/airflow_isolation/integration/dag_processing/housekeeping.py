"""Removes what earlier DAG processors of this host left behind, in a thread of its own, never in the DAG processor's
loop.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import structlog

from airflow_isolation.bridge.prune import prune_when_due
from airflow_isolation.errors import IsolationError
from airflow_isolation.integration.connection import connect

if TYPE_CHECKING:
    from airflow_isolation.settings.effective import ConnectionSettings

log = structlog.get_logger(logger_name="airflow_isolation.dag_processing")

#: Seconds between two looks at the directories, and between two requests to the daemon.
LOOK_EVERY = 15.0
PRUNE_EVERY = 60.0


class Housekeeping:
    """A thread that prunes: at its start, and then when it is due."""

    def __init__(self, connection: ConnectionSettings) -> None:
        self._connection = connection
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prune", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread. Doesn't wait for a daemon that hangs. May be called twice."""
        self._stop.set()

    def _run(self) -> None:
        every = 0.0
        while not self._stop.is_set():
            try:
                if self._prune(every):
                    every = PRUNE_EVERY
            except (IsolationError, OSError) as error:
                log.warning("Looking for left-overs of earlier DAG processors failed", error=str(error))
            except Exception:
                # Some record could not be understood. The thread must still look again later.
                log.exception("Looking for left-overs of earlier DAG processors failed")
            self._stop.wait(LOOK_EVERY)

    def _prune(self, every: float) -> bool:
        """Prune once; False when there was no place to look at."""
        state_dir = self._connection.state_dir
        if not state_dir.is_dir():
            return False
        with connect(self._connection) as runtime:
            prune_when_due(runtime, state_dir=state_dir, every=every)
        return True
