"""Runs a task in a container: Airflow's supervisor in this process, user code in the container.

A coordinator is what Airflow asks to run a task.
"""

from __future__ import annotations

import dataclasses
import os
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from airflow import __version__ as airflow_version
from airflow.sdk.execution_time.coordinator import BaseCoordinator

from airflow_isolation.errors import MAY_HEAL, HostTrouble, IsolationError
from airflow_isolation.integration import by_node, by_worker, end_of_try
from airflow_isolation.integration.asked import Asked
from airflow_isolation.integration.seams import checks, put_off, routing, supervision
from airflow_isolation.integration.seams.configuration import prepared_bundle
from airflow_isolation.integration.seams.masks import own_masks
from airflow_isolation.settings.airflow_configuration import airflow_configuration
from airflow_isolation.settings.resolve import node_settings

if TYPE_CHECKING:
    from airflow.sdk.api.client import Client
    from structlog.typing import FilteringBoundLogger

    from airflow_isolation.bridge.workload import Workload
    from airflow_isolation.integration.asked import StartedTask
    from airflow_isolation.settings.effective import Backend

log = structlog.get_logger(logger_name="airflow_isolation.coordinator")


class ContainerCoordinator(BaseCoordinator):
    """Runs each task in a container of its own, on the backend that ``[core] task_execution_runtime`` names."""

    def __init__(self, *, backend: Backend) -> None:
        """Check that this Airflow is the one that we know.

        :raises AirflowNotSupported: it is not.
        """
        checks.check_version(airflow_version)
        checks.check_names(checks.SUPERVISION)
        self._backend = backend

    def execute_task(
        self,
        *,
        what: Any,
        dag_rel_path: str | os.PathLike[str],
        bundle_info: Any,
        client: Client,
        logger: FilteringBoundLogger | None = None,
        sentry_integration: str = "",
        subprocess_logs_to_stdout: bool,
        **_: Any,
    ) -> BaseCoordinator.ExecutionResult:
        """Run one task to its end. Blocks.

        :raises IsolationError: it could not be started; its log says why.
        """
        task_log = logger or structlog.get_logger(logger_name="task").bind()
        told_pid: int | None = None
        for waited in count():
            try:
                with own_masks(task_log):
                    return self._execute(
                        what=what,
                        dag_rel_path=os.fspath(dag_rel_path),
                        bundle_info=bundle_info,
                        client=client,
                        logger=logger,
                        task_log=task_log,
                        sentry_integration=sentry_integration,
                        subprocess_logs_to_stdout=subprocess_logs_to_stdout,
                        told_pid=told_pid,
                    )
            except _NotStarted as failure:
                error = failure.error
                told_pid = failure.told_pid or told_pid
            task_log.error("The task could not be started in a container", error=str(error))
            if isinstance(error, MAY_HEAL):
                told_pid = told_pid or os.getpid()
                outcome = put_off.put_off(client, what, pid=told_pid, waited=waited)
                if outcome is put_off.PutOff.RESCHEDULED:
                    task_log.warning(
                        "The infrastructure failed, not the task: it will be tried again and no try is used up"
                    )
                    supervision.upload_logs(client, task_log, what)
                    return self.ExecutionResult(1, "up_for_reschedule")
                if outcome is put_off.PutOff.WAITS_HERE:
                    delay = put_off.put_off_delay()
                    task_log.warning(
                        "The infrastructure failed, not the task: it waits here, with the event that resumes it,"
                        " and will be tried again, and no try is used up",
                        seconds=delay,
                    )
                    put_off.wait_alive(client, what, pid=told_pid, seconds=delay)
                    continue
            supervision.upload_logs(client, task_log, what)
            raise error from None
        raise AssertionError("unreachable")

    def _execute(
        self,
        *,
        what: Any,
        dag_rel_path: str,
        bundle_info: Any,
        client: Client,
        logger: FilteringBoundLogger | None,
        task_log: FilteringBoundLogger,
        sentry_integration: str,
        subprocess_logs_to_stdout: bool,
        told_pid: int | None,
    ) -> BaseCoordinator.ExecutionResult:
        executor_config = routing.executor_config_of(what)
        with ExitStack() as stack:
            try:
                bundle_path = stack.enter_context(prepared_bundle(bundle_info.name, bundle_info.version))
            except IsolationError as error:
                raise _NotStarted(error) from error
            dag_file = Path(bundle_path, dag_rel_path)
            asked = Asked(
                backend=self._backend,
                what=what,
                bundle=bundle_info.name,
                bundle_path=bundle_path,
                dag_file=dag_file,
                dag_rel_path=dag_rel_path,
                executor_config=executor_config,
                seconds=supervision.seconds_to_start(client),
            )
            task = _start(asked, task_log)
            workload = task.workload
            stack.callback(task.release)
            task_log.info(
                "Task runs in a container",
                container=workload.container.id,
                image=workload.image.reference,
                digest=workload.image.digest,
                runtime=self._backend,
                start_mode=workload.start_mode,
            )
            if workload.why_fresh:
                task_log.warning("The task could not be forked, and was started fresh", why=workload.why_fresh)
            process = supervision.ContainerActivitySubprocess.supervise(
                workload,
                what=what,
                dag_rel_path=dag_rel_path,
                bundle_info=bundle_info,
                client=client,
                logger=logger,
                sentry_integration=sentry_integration,
                subprocess_logs_to_stdout=subprocess_logs_to_stdout,
                permissions=task.permissions,
                grace=task.grace,
                told_pid=told_pid,
                ended=lambda state: _tell_the_end(task_log, workload, state, what),
            )
            try:
                exit_code = process.wait()
            except supervision.NeverBegan as error:
                raise _NotStarted(error, told_pid=process.pid) from error
        return self.ExecutionResult(exit_code, process.final_state)


def _start(asked: Asked, task_log: FilteringBoundLogger) -> StartedTask:
    """:raises _NotStarted: nothing of it stays."""
    try:
        configuration = airflow_configuration()
        node = node_settings(configuration)
        if node.node:
            return by_node.start(asked, node, task_log)
        return by_worker.start(asked, configuration, task_log)
    except IsolationError as error:
        raise _NotStarted(error) from error
    except OSError as error:
        trouble = HostTrouble(f"The worker's host failed: {error}", hint="Look at its disks, and its limits")
        raise _NotStarted(trouble) from error


@dataclasses.dataclass(eq=False)
class _NotStarted(Exception):
    """The task was not started: no user code ran.

    Attributes:
        told_pid: the pid with which the server was told that the task runs; None when it was not told.

    """

    error: IsolationError
    told_pid: int | None = None


def _tell_the_end(task_log: FilteringBoundLogger, workload: Workload, state: str, what: Any) -> None:
    if workload.ending is not None:
        end_of_try.tell(task_log, workload.ending, state=state, container=workload.container.id, what=what)
