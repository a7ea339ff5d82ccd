"""The provider info that Airflow's discovery reads. Every Airflow process calls it, so it imports little."""

from __future__ import annotations

from typing import Any

from airflow_isolation.settings.provider_config import provider_config


def get_provider_info() -> dict[str, Any]:
    """The provider manifest (airflow/provider_info.schema.json)."""
    return {
        "package-name": "airflow-isolation",
        "name": "Runtime isolation",
        "description": "Run every task and every DAG parse in a container of its own, on containerd or Docker.",
        "config": provider_config(),
        "cli": ["airflow_isolation.integration.cli.definition.get_containers_cli_commands"],
    }
