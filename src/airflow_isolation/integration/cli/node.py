"""``airflow containers node``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow_isolation.integration.cli.backends import named_backend
from airflow_isolation.integration.cli.outcome import OK, UsageError, component
from airflow_isolation.integration.connection import connect
from airflow_isolation.node.run import run_node
from airflow_isolation.settings.airflow_configuration import airflow_configuration
from airflow_isolation.settings.resolve import node_settings, resolve_connection, task_execution_backend

if TYPE_CHECKING:
    from argparse import Namespace


@component
def serve(arguments: Namespace) -> int:
    """The node of this host, until SIGTERM or Ctrl-C."""
    configuration = airflow_configuration()
    backend = named_backend(arguments) or task_execution_backend(configuration)
    if backend is None:
        raise UsageError(
            "No container runtime is named for tasks", hint="Give --backend, or set [core] task_execution_runtime"
        )
    connection = resolve_connection(backend, configuration=configuration)
    run_node(
        connect(connection),
        configuration=configuration,
        connection=connection,
        settings=node_settings(configuration),
    )
    return OK
