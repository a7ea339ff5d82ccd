"""How a task would be started, and why, for commands that show it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow_isolation.bridge.start_mode import foresee
from airflow_isolation.errors import IsolationError
from airflow_isolation.integration.workload_environment import (
    administrators_directories,
    airflow_mounts,
    read_only_mounts,
)
from airflow_isolation.settings.spec import container_spec

if TYPE_CHECKING:
    from pathlib import Path

    from airflow_isolation.settings.effective import EffectiveSettings


def start_row(settings: EffectiveSettings, dag_file: Path | None, bundle_path: Path | None) -> dict[str, str]:
    """The start mode as a row beside the settings. Without ``dag_file`` it holds for DAG files that other users may read."""
    if dag_file is not None and bundle_path is not None:
        mounts = airflow_mounts(bundle_path, dag_file)
    else:
        mounts = read_only_mounts(administrators_directories())
    try:
        decision = foresee(settings, container_spec(settings, argv=(), mounts=mounts))
    except IsolationError as error:
        return {"key": "start", "value": "refused", "origin": str(error)}
    return {"key": "start", "value": decision.mode, "origin": decision.why}
