"""Puts the two feature flags into force. ``import airflow`` loads this in every process (entry point ``airflow.policy``).

The flags are [core] task_execution_runtime and scheduler_dag_parsing_runtime. With both empty nothing is touched and
nothing heavy is imported. A flag with an unknown value, or an Airflow that we don't know, stops the component: user code
never runs outside a container because of a mistake.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

    from airflow_isolation.settings.effective import Backend


def activate() -> None:
    """Read the flags. For each that is set, change Airflow's modules (``seams``) as soon as Airflow imports them.

    :raises SystemExit: a flag has an unknown value, or this release is made for another minor version of Airflow.
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
        parse_in_containers(parse_backend)


def _run_tasks_in_containers(backend: Backend) -> None:
    import wrapt

    from airflow_isolation.errors import IsolationError
    from airflow_isolation.integration.seams import routing

    def container_coordinator() -> Any:
        from airflow_isolation.integration.coordinator import ContainerCoordinator

        return ContainerCoordinator(backend=backend)

    def prepare(_: ModuleType) -> None:
        # Finds mistakes at the start that would fail every task, and does once what every worker would do.
        try:
            container_coordinator()
        except IsolationError as error:
            raise SystemExit(str(error)) from error
        from airflow_isolation.integration.before_forks import prepare_workers

        prepare_workers(backend)

    def route(coordinators: ModuleType) -> None:
        routing.route_every_queue(coordinators, container_coordinator)

    wrapt.register_post_import_hook(route, "airflow.sdk.execution_time.coordinator")
    for command in routing.PARENTS_OF_WORKERS:
        wrapt.register_post_import_hook(prepare, command)
    wrapt.register_post_import_hook(routing.carry_executor_config, "airflow.executors.workloads.task")


def parse_in_containers(backend: Backend) -> None:
    """Close every stock way to parse DAG files in this process, and open ours."""
    import wrapt

    from airflow_isolation.integration.seams import stock_parsing

    def replace(command: ModuleType) -> None:
        from airflow_isolation.errors import IsolationError
        from airflow_isolation.integration.seams import checks
        from airflow_isolation.settings.airflow_configuration import airflow_configuration
        from airflow_isolation.settings.resolve import check_configuration, parse_pool_settings

        # Without this check a mistake in airflow.cfg would be an import error of every DAG file, which unschedules them all.
        try:
            checks.check_names(checks.DAG_PROCESSING)
            configuration = airflow_configuration()
            check_configuration("parse", backend, configuration=configuration)
            parse_pool_settings(configuration)
            stock_parsing.replace_manager(command)
        except IsolationError as error:
            raise SystemExit(str(error)) from error
        importlib.import_module(f"airflow_isolation.runtime.{backend}")

    wrapt.register_post_import_hook(stock_parsing.refuse_stock_manager, stock_parsing.MANAGER)
    wrapt.register_post_import_hook(stock_parsing.refuse_stock_process, stock_parsing.PROCESS)
    wrapt.register_post_import_hook(replace, stock_parsing.COMMAND)
    wrapt.register_post_import_hook(stock_parsing.refuse_commands, stock_parsing.DAG_COMMANDS)


activate()
