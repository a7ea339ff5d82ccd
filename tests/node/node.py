"""A node in a process of its own: `node.py BACKEND`, with the text of airflow.cfg on stdin."""

from __future__ import annotations

import sys
from configparser import ConfigParser
from typing import TYPE_CHECKING

from airflow_isolation.integration.connection import connect
from airflow_isolation.node.run import run_node
from airflow_isolation.settings.airflow_configuration import ConfiguredValue
from airflow_isolation.settings.resolve import node_settings, resolve_connection

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from airflow_isolation.settings.effective import Backend


class Configured:
    """airflow.cfg as a test has it."""

    def __init__(self, text: str) -> None:
        self._parser = ConfigParser(interpolation=None, strict=False)
        self._parser.read_string(text)

    def sections(self) -> Iterable[str]:
        return self._parser.sections()

    def section(self, name: str) -> Mapping[str, ConfiguredValue]:
        if not self._parser.has_section(name):
            return {}
        return {key: ConfiguredValue(text, f"[{name}] in airflow.cfg") for key, text in self._parser[name].items()}


if __name__ == "__main__":
    backend: Backend = "docker" if sys.argv[1] == "docker" else "containerd"
    configuration = Configured(sys.stdin.read())
    connection = resolve_connection(backend, configuration=configuration)
    run_node(
        connect(connection),
        configuration=configuration,
        connection=connection,
        settings=node_settings(configuration),
        hook=lambda: None,
    )
