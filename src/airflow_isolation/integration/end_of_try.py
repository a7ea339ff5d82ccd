"""Writes the last lines of a try into its task's log, and sends the same numbers as metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog

from airflow_isolation.integration.seams import metrics

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from airflow_isolation.bridge.ending import Ending

log = structlog.get_logger(logger_name="airflow_isolation.end_of_try")

_GONE_WELL = frozenset({"success", "skipped", "deferred", "up_for_reschedule", "awaiting_input"})


def tell(task_log: FilteringBoundLogger, ending: Ending, *, state: str, container: str, what: Any) -> None:
    """Write lines and metrics. ``state`` is the try's, ``what`` the task instance. A failure of metrics is only logged."""
    killing = ending.out_of_memory
    if killing is not None:
        # If the task went on and succeeded, a killed child is only a warning. If it failed, that is the likely cause.
        level = "warning" if not killing.fatal and state in _GONE_WELL else "error"
        getattr(task_log, level)(killing.sentence, container=container)
    if ending.from_outside:
        task_log.error(ending.from_outside, container=container)
    task_log.info(f"Task ended with {ending.how}: {ending.usage.sentence}", container=container)
    tags = {"dag_id": what.dag_id, "task_id": what.task_id, "queue": getattr(what, "queue", None) or ""}
    try:
        metrics.record(ending.usage, tags={name: value for name, value in tags.items() if value})
    except Exception:
        log.exception("The metrics of a task could not be sent", container=container)
