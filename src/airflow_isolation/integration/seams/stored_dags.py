"""DAGs as the metadata database has them: no DAG file is executed here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from airflow_isolation.errors import IsolationError

if TYPE_CHECKING:
    from airflow.serialization.definitions.dag import SerializedDAG


class DagNotStored(IsolationError):
    """The metadata database does not have this DAG or task."""


class DatabaseUnusable(IsolationError):
    """The metadata database can't be reached, or is not Airflow's."""


class StoredDag(NamedTuple):
    """Where a DAG's file is on this host, and the executor_config of the task that was asked for."""

    bundle_path: Path
    relative_path: str
    executor_config: dict[str, Any] | None


def stored_dag(dag_id: str) -> SerializedDAG:
    """The DAG as the database has it.

    :raises DagNotStored: no DAG processor has parsed it.
    :raises DatabaseUnusable: the metadata database can't be asked.
    """
    from airflow.models.serialized_dag import SerializedDagModel
    from sqlalchemy.exc import SQLAlchemyError

    try:
        dag = SerializedDagModel.get_dag(dag_id)
    except SQLAlchemyError as error:
        raise DatabaseUnusable(
            f"The metadata database can't be asked for the DAG {dag_id!r}: {getattr(error, 'orig', error)}",
            hint="Is it the right one ([database] sql_alchemy_conn), and up to date (`airflow db migrate`)?",
        ) from error
    if dag is None:
        raise DagNotStored(
            f"There is no DAG {dag_id!r} in the metadata database",
            hint="Look at `airflow dags list-import-errors`, or let a DAG processor (or `airflow dags reserialize`) parse it",
        )
    return dag


def dag_with_task(dag_id: str, task_id: str) -> SerializedDAG:
    """The DAG as the database has it, checked to have the task.

    :raises DagNotStored: no DAG processor has parsed it, or it has no such task.
    :raises DatabaseUnusable: the metadata database can't be asked.
    """
    dag = stored_dag(dag_id)
    if task_id not in dag.task_dict:
        tasks = ", ".join(sorted(dag.task_dict))
        raise DagNotStored(f"The DAG {dag.dag_id} has no task {task_id!r}", hint=f"Its tasks are {tasks}")
    return dag


def locate(dag_id: str, task_id: str | None) -> StoredDag:
    """Where the DAG's file is on this host, and the task's executor_config.

    :raises DagNotStored, DatabaseUnusable: as ``dag_with_task``.
    :raises BundleNotReady: the bundle's files can't be brought to this host.
    """
    from airflow.models.dag import DagModel

    from airflow_isolation.integration.seams.configuration import prepared_bundle

    dag = dag_with_task(dag_id, task_id) if task_id else stored_dag(dag_id)
    model = DagModel.get_current(dag_id)
    if model is None or not model.bundle_name:
        raise DagNotStored(f"The metadata database does not say in which bundle the DAG {dag_id!r} is")
    with prepared_bundle(model.bundle_name, model.bundle_version) as bundle_path:
        config = dict(dag.get_task(task_id).executor_config or {}) if task_id else None
        return StoredDag(Path(bundle_path), model.relative_fileloc or "", config)
