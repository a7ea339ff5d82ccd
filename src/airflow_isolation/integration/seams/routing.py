"""Which coordinator runs a task, and what a task's workload carries to it.

Airflow 3.3 chooses a coordinator by the exact name of the task's queue (``[sdk] queue_to_coordinator``) and has no
entry for "every other queue", so ``CoordinatorManager.for_queue`` is wrapped. Queues that the administrator has mapped
keep their coordinator.

``executor_config`` is not part of the workload that Celery and Edge send (``TaskInstanceDTO`` excludes it). The only free
mapping that is sent is ``context_carrier``, so it goes there; trace propagators ignore keys that they don't know.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from airflow_isolation.integration.seams import checks

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

CARRIER_KEY = "airflow-isolation.executor-config"
#: Commands whose processes fork the workers that run tasks. No worker has to import again what they have imported.
PARENTS_OF_WORKERS = (
    "airflow.cli.commands.scheduler_command",
    "airflow.providers.celery.cli.celery_command",
    "airflow.providers.edge3.cli.worker",
)
#: The keys of ``executor_config`` that are ours.
CONTAINER_KEYS = ("container", "containerd", "docker")


def route_every_queue(coordinators: ModuleType, container_coordinator: Callable[[], Any]) -> None:
    """Let ``container_coordinator()`` run the tasks of all queues that are not mapped in [sdk] queue_to_coordinator.

    :param coordinators: the module ``airflow.sdk.execution_time.coordinator``, just imported.
    :raises AirflowNotSupported: it is not as expected.
    """
    checks.check_module(coordinators)
    stock = coordinators.CoordinatorManager.for_queue
    make = functools.cache(container_coordinator)

    @functools.wraps(stock)
    def for_queue(manager: Any, queue: str) -> Any:
        if queue in manager._queue_to_coordinator:  # noqa: SLF001 - the manager has no public question for this
            return stock(manager, queue)
        return make()

    coordinators.CoordinatorManager.for_queue = for_queue


def carry_executor_config(workloads: ModuleType) -> None:
    """Put our keys of ``executor_config`` into the workload's ``context_carrier``, so that Celery and Edge send them.

    :param workloads: the module ``airflow.executors.workloads.task``, just imported.
    :raises AirflowNotSupported: it is not as expected.
    """
    checks.check_module(workloads)
    stock = workloads.ExecuteTask.make.__func__

    @functools.wraps(stock)
    def make(cls: Any, ti: Any, *arguments: Any, **keywords: Any) -> Any:
        workload = stock(cls, ti, *arguments, **keywords)
        ours = container_part(workload.ti.executor_config)
        if ours:
            workload.ti.context_carrier = {**(workload.ti.context_carrier or {}), CARRIER_KEY: json.dumps(ours)}
        return workload

    workloads.ExecuteTask.make = classmethod(make)


def container_part(executor_config: object) -> dict[str, Any]:
    """Our keys of a task's ``executor_config``. Other keys are for other executors; the value itself may be anything."""
    if not isinstance(executor_config, Mapping):
        return {}
    return {key: executor_config[key] for key in CONTAINER_KEYS if key in executor_config}


def executor_config_of(what: Any) -> dict[str, Any]:
    """Our keys of a task's ``executor_config``: from the task instance (LocalExecutor), or its carrier (Celery and Edge).

    :param what: the TaskInstance of a workload. Our entry is removed from its carrier, so that the task never sees it.
    """
    carrier = dict(getattr(what, "context_carrier", None) or {})
    carried = carrier.pop(CARRIER_KEY, None)
    if carried is not None:
        what.context_carrier = carrier or None
    direct = container_part(getattr(what, "executor_config", None))
    if direct:
        return direct
    return container_part(json.loads(carried)) if carried else {}
