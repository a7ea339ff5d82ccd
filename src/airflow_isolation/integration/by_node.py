"""A task's container made by this host's node: the worker needs neither root nor the daemon's socket."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from airflow import __version__ as airflow_version

from airflow_isolation.errors import SettingError
from airflow_isolation.integration import workload_environment
from airflow_isolation.integration.asked import StartedTask
from airflow_isolation.integration.dag_processing.links import stray_dag_file
from airflow_isolation.integration.local_settings import local_settings_digest
from airflow_isolation.node.client import start_by_node
from airflow_isolation.node.request import StartRequest
from airflow_isolation.settings.dag_metadata import EXECUTOR_CONFIG, OUR_KEYS, find_document
from airflow_isolation.settings.effective import Volume

if TYPE_CHECKING:
    from collections.abc import Mapping

    from structlog.typing import FilteringBoundLogger

    from airflow_isolation.integration.asked import Asked
    from airflow_isolation.settings.effective import NodeSettings


def start(asked: Asked, node: NodeSettings, task_log: FilteringBoundLogger) -> StartedTask:
    """Have the node start it. When this fails nothing of it stays.

    :raises IsolationError: as ``start_by_node``.
    """
    mounts = workload_environment.airflow_mounts(asked.bundle_path, asked.dag_file)
    document = find_document(asked.dag_file, asked.bundle_path)
    request = StartRequest(
        backend=asked.backend,
        airflow=airflow_version,
        dag_id=asked.what.dag_id,
        task_id=asked.what.task_id,
        executor_config=_ours(asked.executor_config),
        has_document=document is not None,
        document_source=document.source if document is not None else "",
        labels=asked.labels,
        forwarded=workload_environment.forwarded_environment(),
        own=workload_environment.bundle_environment(asked.bundle, asked.bundle_path),
        mounts=mounts,
        shared_mounts=workload_environment.shared_mounts(),
        settings_digest=local_settings_digest(),
        pull_timeout=asked.seconds,
    )
    started = start_by_node(
        node,
        request,
        sources=[mount.source for mount in request.binds],
        document=document,
        waits=lambda why: task_log.info("The task waits for its turn on this host", why=why),
    )
    volumes = [Volume(source, target) for source, target in started.volumes]
    if stray := stray_dag_file(asked.dag_file, asked.bundle_path, mounts, volumes):
        task_log.warning("The DAG file may not be found in the container", why=str(stray), hint=stray.hint)
    return StartedTask(
        workload=started.workload,
        permissions=started.permissions,
        grace=started.grace,
        release=started.workload.close,
    )


def _ours(executor_config: Mapping[str, object] | None) -> Mapping[str, Any]:
    """What the node is to judge; other executors' keys may be anything."""
    ours = {key: value for key, value in (executor_config or {}).items() if key in OUR_KEYS}
    try:
        found: Mapping[str, Any] = json.loads(json.dumps(ours))
    except (TypeError, ValueError, RecursionError) as error:
        raise SettingError(f"this can't be sent to the node: {error}", source=EXECUTOR_CONFIG) from None
    return found
