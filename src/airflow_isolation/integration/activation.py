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

    flags = ("task_execution_runtime", "scheduler_dag_parsing_runtime")
    if not any((conf.get("core", flag, fallback="") or "").strip() for flag in flags):
        return

    from airflow_isolation.errors import IsolationError
    from airflow_isolation.integration.seams.checks import check_version
    from airflow_isolation.settings.airflow_configuration import airflow_configuration
    from airflow_isolation.settings.resolve import dag_parsing_backend, task_execution_backend

    try:
        check_version(airflow_version)
        configuration = airflow_configuration()
        task_backend, parse_backend = task_execution_backend(configuration), dag_parsing_backend(configuration)
    except IsolationError as error:
        # SystemExit, because callers of entry points tend to log an Exception and go on.
        raise SystemExit(str(error)) from error
    if task_backend is not None:
        _run_tasks_in_containers(task_backend)
    if parse_backend is not None:
        _refuse_to_parse()


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


def _refuse_to_parse() -> None:
    """Who asks for DAG files to be parsed in containers must not get them parsed on the host in silence."""
    import wrapt

    from airflow_isolation.integration.seams import routing

    def stop(_: ModuleType) -> None:
        raise SystemExit(
            "[core] scheduler_dag_parsing_runtime is set, but this release of airflow-isolation runs tasks in "
            "containers, not yet DAG parsing. Unset it to have DAG files parsed by stock Airflow, on this host"
        )

    wrapt.register_post_import_hook(stop, routing.DAG_PROCESSOR)


activate()
