"""Finds the container that a DAG file needs for its parse."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow_isolation.bridge.parse_pool import ParseRequest
from airflow_isolation.integration import workload_environment
from airflow_isolation.integration.dag_processing.links import check_dag_file
from airflow_isolation.runtime import labels
from airflow_isolation.settings.airflow_configuration import airflow_configuration
from airflow_isolation.settings.hook import image_hook
from airflow_isolation.settings.resolve import resolve

if TYPE_CHECKING:
    from collections.abc import Hashable
    from pathlib import Path

    from airflow_isolation.settings.airflow_configuration import Configuration
    from airflow_isolation.settings.effective import Backend


def parse_request_for(
    file: Hashable,
    *,
    backend: Backend,
    bundle_name: str,
    bundle_path: Path,
    relative_path: Path,
    configuration: Configuration | None = None,
) -> ParseRequest:
    """The request for one DAG file, for a pool or ``start_parse_container``.

    :param file: any value; the pool's answer has it again.
    :param bundle_path: the bundle on this host; in the container it is at the same place, read-only.
    :param configuration: this process's configuration, if it has been read already.
    :raises SettingError: a mistake in the settings of this file, with source, line and key; or a link in its path leads to
        a file that the container does not have.
    :raises PolicyRefused: the policy forbids something in the settings.
    """
    dag_file = bundle_path / relative_path
    settings = resolve(
        "parse",
        backend,
        configuration=configuration or airflow_configuration(),
        dag_file=dag_file,
        bundle_path=bundle_path,
        hook=image_hook(),
    )
    mounts = workload_environment.airflow_mounts(bundle_path, dag_file)
    check_dag_file(dag_file, bundle_path, mounts, settings.volumes)
    return ParseRequest(
        file=file,
        settings=settings,
        mounts=mounts,
        environment={
            **workload_environment.forwarded_environment(),
            **workload_environment.bundle_environment(bundle_name, bundle_path),
        },
        labels={labels.BUNDLE: bundle_name},
    )
