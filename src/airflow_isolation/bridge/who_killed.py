"""Who ended a container, as far as its daemon knows.

The kernel writes down nobody who sends a signal, and no daemon who asks it to send one. Docker remembers what it was asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import structlog

from airflow_isolation.errors import IsolationError

if TYPE_CHECKING:
    import signal

log = structlog.get_logger(logger_name="airflow_isolation.workload")


class Asked(Protocol):
    """As ``ContainerRuntime``."""

    def signals_asked_for(self, id: str) -> tuple[signal.Signals, ...]: ...


def who_killed(runtime: Asked, id: str) -> str:
    """A sentence without its full stop; empty when nobody knows. To be asked of what this worker did not end."""
    try:
        asked = dict.fromkeys(number.name for number in runtime.signals_asked_for(id))
    except IsolationError as error:
        log.warning("Who ended a container can't be asked", container=id, error=str(error))
        return ""
    if not asked:
        return ""
    signals = ", ".join(asked)
    return (
        f"Somebody asked the daemon to send it {signals}, as its command line and its API do: look at the daemon's log"
    )
