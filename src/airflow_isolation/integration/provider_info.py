"""What Airflow's provider discovery reads about us."""

from __future__ import annotations

from typing import Any


def get_provider_info() -> dict[str, Any]:
    """The provider manifest (airflow/provider_info.schema.json)."""
    return {
        "package-name": "airflow-isolation",
        "name": "Runtime isolation",
        "description": "Run every task and every DAG parse in a container of its own, on containerd or Docker.",
    }
