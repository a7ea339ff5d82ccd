"""A task's container made by the worker itself, which is root and has the daemon's socket."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from airflow import __version__ as airflow_version

from airflow_isolation.bridge.prepared import OfTheWorker, prepared
from airflow_isolation.bridge.workload import launch
from airflow_isolation.integration import workload_environment
from airflow_isolation.integration.asked import StartedTask
from airflow_isolation.integration.backstages import backstage
from airflow_isolation.integration.dag_processing.links import stray_dag_file
from airflow_isolation.integration.local_settings import local_settings_digest
from airflow_isolation.runtime import labels
from airflow_isolation.settings.hook import image_hook
from airflow_isolation.settings.resolve import resolve

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from airflow_isolation.integration.asked import Asked
    from airflow_isolation.settings.airflow_configuration import Configuration


def start(asked: Asked, configuration: Configuration, task_log: FilteringBoundLogger) -> StartedTask:
    """Start it. When this fails nothing of it stays.

    :raises IsolationError: as ``resolve`` and ``launch``.
    """
    settings = resolve(
        "task",
        asked.backend,
        configuration=configuration,
        dag_file=asked.dag_file,
        bundle_path=asked.bundle_path,
        dag_id=asked.what.dag_id,
        task_id=asked.what.task_id,
        executor_config=asked.executor_config,
        hook=image_hook(),
    )
    behind = backstage(settings.connection)
    runtime = behind.runtime
    # When the task is tried again, the pull goes on where it was stopped.
    timeout = min(settings.image_pull_timeout, asked.seconds)
    image = runtime.ensure_image(settings.image, settings.image_pull_policy, timeout=timeout)
    mounts = workload_environment.airflow_mounts(asked.bundle_path, asked.dag_file)
    if stray := stray_dag_file(asked.dag_file, asked.bundle_path, mounts, settings.volumes):
        # No error: the image may have the file at that place, and a task, unlike a parse, shows it to nobody.
        task_log.warning("The DAG file may not be found in the container", why=str(stray), hint=stray.hint)
    worker = OfTheWorker(
        airflow=airflow_version,
        forwarded=workload_environment.forwarded_environment(),
        own=workload_environment.bundle_environment(asked.bundle, asked.bundle_path),
        mounts=mounts,
        shared_mounts=workload_environment.shared_mounts(),
        settings_digest=local_settings_digest(),
        labels={labels.PURPOSE: "task", **asked.labels, labels.OWNER: str(labels.Owner.this_process())},
    )
    task, plan = prepared(settings, worker, runtime=runtime, image=image)
    spares = settings.zygote.spare_containers
    workload = launch(
        runtime,
        task,
        state_dir=settings.connection.state_dir,
        plan=plan,
        relabel=behind.relabel,
        replenish=partial(behind.replenish, wanted=spares) if spares else None,
    )
    return StartedTask(
        workload=workload,
        permissions=settings.permissions,
        grace=settings.stop_grace_period,
        release=partial(behind.release, workload.close),
    )
