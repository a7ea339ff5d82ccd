"""A node in a process of its own: `node.py BACKEND`, with the text of airflow.cfg on stdin."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from tests.unit.settings.conftest import Ini

from airflow_isolation.integration.connection import connect
from airflow_isolation.node.run import run_node
from airflow_isolation.settings.resolve import node_settings, resolve_connection

if TYPE_CHECKING:
    from airflow_isolation.settings.effective import Backend


if __name__ == "__main__":
    backend: Backend = "docker" if sys.argv[1] == "docker" else "containerd"
    configuration = Ini(sys.stdin.read())
    connection = resolve_connection(backend, configuration=configuration)
    run_node(
        connect(connection),
        configuration=configuration,
        connection=connection,
        settings=node_settings(configuration),
        hook=lambda: None,
    )
