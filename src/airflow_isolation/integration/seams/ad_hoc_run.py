"""Runs one task on request, with the execution API in this process instead of an api-server."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from airflow_isolation.errors import IsolationError
from airflow_isolation.integration.seams import checks, console, stored_dags
from airflow_isolation.settings.airflow_configuration import airflow_configuration
from airflow_isolation.settings.resolve import dag_parsing_backend

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airflow.models.taskinstance import TaskInstance
    from airflow.sdk.execution_time.coordinator import BaseCoordinator

#: States in which an executor runs the task or is about to.
_BUSY = frozenset({"queued", "running", "restarting", "deferred"})


class NotRunnable(IsolationError):
    """This task can't be run on request."""


@contextmanager
def prepared(
    dag_id: str, task_id: str, *, map_index: int, run_id: str | None, logical_date_or_run_id: str | None
) -> Iterator[TaskInstance]:
    """Yield a task instance that is ready to be queued. A DAG run that is made for it is deleted at the end.

    :raises DagNotStored: there is no such DAG or task.
    :raises NotRunnable: there is no such run or map index, or the task is running already.
    """
    checks.check_names(checks.AD_HOC_RUN)
    from airflow.cli.commands import task_command
    from airflow.sdk.exceptions import AirflowException

    dag = stored_dags.dag_with_task(dag_id, task_id)
    try:
        instance, made = task_command._get_ti(  # noqa: SLF001 - what `airflow tasks test` does; there is no public way
            dag.get_task(task_id),
            map_index,
            logical_date_or_run_id=run_id or logical_date_or_run_id,
            create_if_necessary=False if run_id else "db",
        )
    except (AirflowException, RuntimeError, ValueError) as error:
        raise NotRunnable(f"The task {task_id} of the DAG {dag_id} can't be run: {error}") from error
    try:
        if made:
            _hide_from_scheduler(instance)
        elif instance.state in _BUSY:
            raise NotRunnable(
                f"The task {task_id} of the run {instance.run_id} is {instance.state}",
                hint="Wait for its end, or leave the run out: one is then made for the test",
            )
        yield instance
    finally:
        if made:
            _delete_run(instance)


def run(coordinator: BaseCoordinator, instance: TaskInstance) -> str:
    """Run the task to its end, through deferrals; returns its final state. Its log goes to stdout. Blocks.

    :raises IsolationError: it could not be started, or the server refused a request for it.
    """
    from airflow.executors.workloads import ExecuteTask
    from airflow.sdk._shared.secrets_masker import SecretsMasker
    from airflow.sdk.api.client import ServerResponseError
    from airflow.sdk.execution_time.supervisor import InProcessTestSupervisor
    from airflow.utils.state import TaskInstanceState

    SecretsMasker.enable_log_masking()
    logger = console.task_logger()
    client = InProcessTestSupervisor._api_client(instance.task.dag)  # type: ignore[no-untyped-call,union-attr]  # noqa: SLF001
    while True:
        instance.set_state(TaskInstanceState.QUEUED)
        workload = ExecuteTask.make(instance)
        try:
            result = coordinator.execute_task(
                what=workload.ti,  # type: ignore[arg-type]  # as LocalExecutor gives it, with executor_config
                dag_rel_path=workload.dag_rel_path,
                bundle_info=workload.bundle_info,
                client=client,
                logger=logger,
                subprocess_logs_to_stdout=False,  # the logger writes there already
            )
        except ServerResponseError as error:
            instance.refresh_from_db()
            raise NotRunnable(
                f"The task {instance.task_id} of the run {instance.run_id} is {instance.state}, and what was asked for it "
                f"was refused: {error}",
                hint="Somebody else may have changed its state meanwhile; try again",
            ) from error
        instance.refresh_from_db()
        if result.final_state != TaskInstanceState.DEFERRED:
            return str(getattr(result.final_state, "value", result.final_state))
        _wait_for_trigger(instance)


def make_known(dag_id: str, task_id: str) -> None:
    """Make sure that the DAG is in the database. If not, it is parsed here, but only if DAG files are parsed on the host.

    :raises DagNotStored: there is no such DAG or task.
    :raises DatabaseUnusable: the metadata database can't be asked.
    """
    from airflow.utils.cli import get_bagged_dag

    try:
        stored_dags.dag_with_task(dag_id, task_id)
    except stored_dags.DagNotStored as error:
        if dag_parsing_backend(airflow_configuration()) is not None:
            raise
        try:
            get_bagged_dag(None, dag_id)  # stores what it finds
        except Exception:  # noqa: BLE001 - that it is not there either is no better answer
            raise error from None
        stored_dags.dag_with_task(dag_id, task_id)


def _hide_from_scheduler(instance: TaskInstance) -> None:
    """Keep a scheduler from running the other tasks of the run, as it would for one under way."""
    from airflow.models.dagrun import DagRun
    from airflow.utils.session import create_session
    from airflow.utils.state import DagRunState

    with create_session() as session:
        session.get_one(DagRun, instance.dag_run.id).state = DagRunState.SUCCESS
        # The scheduler counts the first try as 1.
        session.merge(instance).try_number = 1
    instance.refresh_from_db()


def _delete_run(instance: TaskInstance) -> None:
    from airflow.utils.session import create_session

    with create_session() as session:
        session.delete(instance.dag_run)


def _wait_for_trigger(instance: TaskInstance) -> None:
    """Run the task's trigger, as the triggerer would, and leave the task ready to be resumed.

    :raises NotRunnable: the trigger can't be run here, or ends without an event.
    """
    from airflow._shared.module_loading import import_string
    from airflow.models.trigger import Trigger, handle_event_submit
    from airflow.sdk.execution_time.supervisor import InProcessTestSupervisor
    from airflow.utils.session import create_session

    with create_session() as session:
        row = session.get_one(Trigger, instance.trigger_id)
        classpath, arguments = row.classpath, row.kwargs
    try:
        trigger = import_string(classpath)(**arguments)
        event = InProcessTestSupervisor.run_trigger_in_process(trigger=trigger, ti=instance)  # type: ignore[no-untyped-call]
    except Exception as error:
        raise NotRunnable(f"The task waits for {classpath}, which failed: {error!r}") from error
    if event is None:
        raise NotRunnable(f"The task waits for {classpath}, which ended without an event")
    with create_session() as session:
        handle_event_submit(event, task_instance=session.merge(instance), session=session)
    instance.refresh_from_db()
