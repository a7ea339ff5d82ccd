"""The coordinator that runs a task in a container: Airflow's supervisor here, user code there."""

from __future__ import annotations

import dataclasses
import os
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from airflow import __version__ as airflow_version
from airflow.sdk.execution_time.coordinator import BaseCoordinator

from airflow_isolation.bridge.start_mode import decide
from airflow_isolation.bridge.started_agent import Launch
from airflow_isolation.bridge.workload import launch
from airflow_isolation.errors import MAY_HEAL, HostTrouble, IsolationError
from airflow_isolation.integration import end_of_try, workload_environment
from airflow_isolation.integration.backstages import backstage
from airflow_isolation.integration.dag_processing.links import stray_dag_file
from airflow_isolation.integration.seams import checks, put_off, routing, supervision
from airflow_isolation.integration.seams.configuration import prepared_bundle
from airflow_isolation.integration.seams.masks import own_masks
from airflow_isolation.integration.zygotes import zygote_plan
from airflow_isolation.oci.identifier import new_container_id
from airflow_isolation.runtime import labels
from airflow_isolation.settings.airflow_configuration import airflow_configuration
from airflow_isolation.settings.hook import image_hook
from airflow_isolation.settings.resolve import resolve
from airflow_isolation.settings.spec import container_spec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow.sdk.api.client import Client
    from structlog.typing import FilteringBoundLogger

    from airflow_isolation.bridge.workload import Workload
    from airflow_isolation.settings.effective import Backend

log = structlog.get_logger(logger_name="airflow_isolation.coordinator")


class ContainerCoordinator(BaseCoordinator):
    """Runs each task in a container of its own, on the backend that ``[core] task_execution_runtime`` names."""

    def __init__(self, *, backend: Backend) -> None:
        """:raises AirflowNotSupported: this Airflow is not the one that we know."""
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
        """Run one task to its end.

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
                        "Infrastructure trouble, not the task's: it will be tried again and no try is used up"
                    )
                    supervision.upload_logs(client, task_log, what)
                    return self.ExecutionResult(1, "up_for_reschedule")
                if outcome is put_off.PutOff.WAITS_HERE:
                    delay = put_off.put_off_delay()
                    task_log.warning(
                        "Infrastructure trouble, not the task's: it waits here, with the event that resumes it,"
                        " will be tried again, and no try is used up",
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
            try:
                settings = resolve(
                    "task",
                    self._backend,
                    configuration=airflow_configuration(),
                    dag_file=dag_file,
                    bundle_path=bundle_path,
                    dag_id=what.dag_id,
                    task_id=what.task_id,
                    executor_config=executor_config,
                    hook=image_hook(),
                )
                behind = backstage(settings.connection)
                runtime = behind.runtime
                # A pull that is broken off goes on where it was, when the task is tried again.
                timeout = min(settings.image_pull_timeout, supervision.seconds_to_start(client))
                image = runtime.ensure_image(settings.image, settings.image_pull_policy, timeout=timeout)
                mounts = workload_environment.airflow_mounts(bundle_path, dag_file)
                if stray := stray_dag_file(dag_file, bundle_path, mounts, settings.volumes):
                    # No error: an image may have the file in that place, and a task shows nobody what it finds.
                    task_log.warning("The DAG file may not be found in the container", why=str(stray), hint=stray.hint)
                spec = container_spec(
                    settings,
                    argv=(),
                    mounts=mounts,
                    labels=_labels(what, bundle_info.name, dag_rel_path),
                )
                forwarded = workload_environment.forwarded_environment()
                decision = decide(settings, spec, runtime=runtime, image_digest=image.digest)
                task = Launch(
                    id=new_container_id("task"),
                    spec=decision.applied_to(spec),
                    image=image,
                    purpose="task",
                    environment={
                        **forwarded,
                        **workload_environment.bundle_environment(bundle_info.name, bundle_path),
                    },
                    airflow=airflow_version,
                    python=settings.python,
                    start_timeout=settings.start_timeout,
                )
                plan = zygote_plan(settings, task, decision, environment=forwarded) if decision.mode == "fork" else None
                spares = settings.zygote.spare_containers
                workload = launch(
                    runtime,
                    task,
                    state_dir=settings.connection.state_dir,
                    plan=plan,
                    relabel=behind.relabel,
                    replenish=partial(behind.replenish, wanted=spares) if spares else None,
                )
                stack.callback(behind.release, workload.close)
            except IsolationError as error:
                raise _NotStarted(error) from error
            except OSError as error:
                trouble = HostTrouble(f"The worker's host failed: {error}", hint="Look at its disks, and its limits")
                raise _NotStarted(trouble) from error
            task_log.info(
                "Task runs in a container",
                container=workload.container.id,
                image=settings.image,
                digest=image.digest,
                runtime=settings.backend,
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
                permissions=settings.permissions,
                grace=settings.stop_grace_period,
                told_pid=told_pid,
                ended=lambda state: _tell_the_end(task_log, workload, state, what),
            )
            try:
                exit_code = process.wait()
            except supervision.NeverBegan as error:
                raise _NotStarted(error, told_pid=process.pid) from error
        return self.ExecutionResult(exit_code, process.final_state)


@dataclasses.dataclass(eq=False)
class _NotStarted(Exception):
    """No user code ran.

    Attributes:
        told_pid: with which the server has been told that the task runs; None when it has not been.

    """

    error: IsolationError
    told_pid: int | None = None


def _tell_the_end(task_log: FilteringBoundLogger, workload: Workload, state: str, what: Any) -> None:
    if workload.ending is not None:
        end_of_try.tell(task_log, workload.ending, state=state, container=workload.container.id, what=what)


def _labels(what: Any, bundle: str, dag_file: str) -> Mapping[str, str]:
    return {
        labels.PURPOSE: "task",
        labels.DAG_ID: what.dag_id,
        labels.TASK_ID: what.task_id,
        labels.RUN_ID: what.run_id,
        labels.MAP_INDEX: str(-1 if what.map_index is None else what.map_index),
        labels.TRY_NUMBER: str(what.try_number),
        labels.TI_ID: str(what.id),
        labels.BUNDLE: bundle,
        labels.DAG_FILE: dag_file,
        labels.OWNER: str(labels.Owner.this_process()),
    }
