"""Loaded by ``import airflow`` in every process (entry point ``airflow.policy``): puts the feature flags into force.

With both flags empty nothing is touched and nothing heavy is imported. A flag with an unknown value, or an Airflow that
is not as we know it, stops the component: user code never runs outside a container because of a mistake.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

    from airflow_isolation.settings.effective import Backend


def activate() -> None:
    """Read the flags and, when one is set, have its seam applied as soon as Airflow imports the module in question.

    :raises SystemExit: a flag has an unknown value, or this Airflow is of another minor than we are made for.
    """
    from airflow import __version__ as airflow_version
    from airflow.configuration import conf

    if not (conf.get("core", "task_execution_runtime", fallback="") or "").strip():
        return

    from airflow_isolation.errors import IsolationError
    from airflow_isolation.integration.seams.checks import check_version
    from airflow_isolation.settings.airflow_configuration import airflow_configuration
    from airflow_isolation.settings.resolve import task_execution_backend

    try:
        check_version(airflow_version)
        backend = task_execution_backend(airflow_configuration())
    except IsolationError as error:
        # SystemExit, because callers of entry points tend to log an Exception and go on.
        raise SystemExit(str(error)) from error
    if backend is not None:
        _run_tasks_in_containers(backend)


def _run_tasks_in_containers(backend: Backend) -> None:
    import wrapt

    from airflow_isolation.errors import IsolationError
    from airflow_isolation.integration.seams import routing

    def container_coordinator() -> Any:
        from airflow_isolation.integration.coordinator import ContainerCoordinator

        return ContainerCoordinator(backend=backend)

    def prepare(_: ModuleType) -> None:
        # Finds out at start what would otherwise fail every task, and imports once what every worker would import.
        try:
            container_coordinator()
        except IsolationError as error:
            raise SystemExit(str(error)) from error
        importlib.import_module(f"airflow_isolation.runtime.{backend}")

    def route(coordinators: ModuleType) -> None:
        routing.route_every_queue(coordinators, container_coordinator)

    wrapt.register_post_import_hook(route, "airflow.sdk.execution_time.coordinator")
    for command in routing.PARENTS_OF_WORKERS:
        wrapt.register_post_import_hook(prepare, command)
    wrapt.register_post_import_hook(routing.carry_executor_config, "airflow.executors.workloads.task")


activate()
