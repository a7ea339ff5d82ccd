"""A task that is to run in a container, and what the supervisor needs of it when it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_isolation.runtime import labels

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from airflow_isolation.bridge.workload import Workload
    from airflow_isolation.settings.effective import Backend, Permissions


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """``what`` is Airflow's task instance; ``seconds`` are what its token leaves for a pull."""

    backend: Backend
    what: Any
    bundle: str
    bundle_path: Path
    dag_file: Path
    dag_rel_path: str
    executor_config: Mapping[str, object] | None
    seconds: float

    @property
    def labels(self) -> Mapping[str, str]:
        """Whose container it is, without its owner."""
        what = self.what
        return {
            labels.DAG_ID: what.dag_id,
            labels.TASK_ID: what.task_id,
            labels.RUN_ID: what.run_id,
            labels.MAP_INDEX: str(-1 if what.map_index is None else what.map_index),
            labels.TRY_NUMBER: str(what.try_number),
            labels.TI_ID: str(what.id),
            labels.BUNDLE: self.bundle,
            labels.DAG_FILE: self.dag_rel_path,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedTask:
    """``release`` gives back all of it, and need not be waited for; ``grace`` is in seconds."""

    workload: Workload
    permissions: Permissions
    grace: float
    release: Callable[[], None]
