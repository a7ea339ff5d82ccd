"""From settings to a connected runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from airflow_isolation.runtime.interface import ContainerRuntime
    from airflow_isolation.settings.effective import ConnectionSettings


def connect(settings: ConnectionSettings) -> ContainerRuntime:
    """A connection to the daemon that the settings name; the caller closes it.

    :raises RuntimeUnreachable: nobody answers at the socket.
    """
    raise NotImplementedError
