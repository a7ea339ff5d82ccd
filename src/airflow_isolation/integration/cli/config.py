"""``airflow containers config``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from airflow_isolation.errors import SettingError
from airflow_isolation.integration.cli import dag_file
from airflow_isolation.integration.cli.backends import choose, named_backend
from airflow_isolation.integration.cli.outcome import OK, UsageError, command, say
from airflow_isolation.integration.cli.output import print_rows
from airflow_isolation.integration.cli.settings import COLUMNS, every
from airflow_isolation.integration.cli.start_mode import start_row
from airflow_isolation.settings.airflow_configuration import airflow_configuration
from airflow_isolation.settings.hook import image_hook
from airflow_isolation.settings.resolve import dag_parsing_backend, resolve, task_execution_backend

if TYPE_CHECKING:
    from argparse import Namespace
    from pathlib import Path

    from airflow_isolation.settings.airflow_configuration import Configuration
    from airflow_isolation.settings.effective import Backend, Purpose

_FLAGS: Final = {"task": "task_execution_runtime", "parse": "scheduler_dag_parsing_runtime"}


class DagPlace(NamedTuple):
    """Where a DAG file is, and the executor_config of the task that was named."""

    dag_file: Path | None = None
    bundle_path: Path | None = None
    executor_config: dict[str, Any] | None = None


@command
def show_settings(arguments: Namespace) -> int:
    """Print every setting that holds, its value, and where it was written; for a task also its start mode, and why.

    No daemon is asked.
    """
    purpose = cast("Purpose", arguments.purpose)
    if arguments.task_id and not (arguments.dag_id or arguments.dag_file):
        raise UsageError("--task-id needs --dag-id or --dag-file", hint="Task ids are unique in their DAG only")
    configuration = airflow_configuration()
    backend = _backend(arguments, purpose, configuration)
    place = _place(arguments)
    settings = resolve(
        purpose,
        backend,
        configuration=configuration,
        dag_file=place.dag_file,
        bundle_path=place.bundle_path,
        dag_id=arguments.dag_id or "",
        task_id=arguments.task_id or "",
        executor_config=place.executor_config,
        hook=image_hook(),
    )
    rows = every(settings)
    if purpose == "task":
        rows.append(start_row(settings, place.dag_file, place.bundle_path))
    print_rows(rows, COLUMNS, arguments.output, nothing="There are no settings.")
    return OK


def _backend(arguments: Namespace, purpose: Purpose, configuration: Configuration) -> Backend:
    """The backend that the command line names, else the purpose's flag, else one found here, else containerd: no daemon
    is needed.
    """
    named = named_backend(arguments)
    flagged = task_execution_backend(configuration) if purpose == "task" else dag_parsing_backend(configuration)
    if named or flagged:
        return cast("Backend", named or flagged)
    try:
        backend = choose(arguments).connections[0].backend
    except SettingError:
        raise
    except Exception:  # noqa: BLE001 - no daemon is here
        backend = "containerd"
    what = "tasks run" if purpose == "task" else "DAG files are parsed"
    say(f"[core] {_FLAGS[purpose]} is empty: {what} outside of containers. These settings would hold with {backend}.")
    return backend


def _place(arguments: Namespace) -> DagPlace:
    if arguments.dag_id and not arguments.dag_file:
        from airflow_isolation.integration.seams import stored_dags

        stored = stored_dags.locate(arguments.dag_id, arguments.task_id)
        return DagPlace(stored.bundle_path / stored.relative_path, stored.bundle_path, stored.executor_config)
    if not arguments.dag_file:
        return DagPlace()
    file = dag_file.locate(arguments.dag_file)
    return DagPlace(file.path, file.bundle_path)
