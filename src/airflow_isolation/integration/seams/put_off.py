"""Tries that the infrastructure kept from beginning are tried again, and are not used up.

Airflow counts all reschedules of a try together, and a sensor has many of its own. So ours are counted in Airflow's store
of a task's state, which is the same for all hosts on which it is tried.
"""

from __future__ import annotations

import enum
import time
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import httpx
import structlog
from airflow.sdk.configuration import conf
from airflow.sdk.execution_time import comms

if TYPE_CHECKING:
    from airflow.sdk.api.client import Client

log = structlog.get_logger(logger_name="airflow_isolation.put_off")

#: What the count is called in the store. It is shared by all tries of a task in one run, so it names its try.
KEY = "airflow_isolation.put_off"

#: So long after the last time the store may forget them.
_FORGET_AFTER = timedelta(days=1)

#: Between two signs of life of a try that waits, in seconds: the server takes one without for dead after 300.
_SIGN_OF_LIFE = 10.0


class PutOff(enum.Enum):
    """What happens to a try that the infrastructure kept from beginning."""

    RESCHEDULED = enum.auto()
    WAITS_HERE = enum.auto()
    USED_UP = enum.auto()


def put_off(client: Client, what: Any, *, pid: int, waited: int = 0) -> PutOff:
    """Have the scheduler start this try again later, because the infrastructure failed before any user code ran.

    Like a DAG file that is not there yet, at most ``[workers] missing_dag_retries`` times; no try is used up. When those are
    used up, the executor's report fails the try. One that is resumed after a deferral must wait here: rescheduled, it would
    lose its event, and begin anew.

    :param pid: what the server is told for the task's process, now and when it starts.
    :param waited: how often it has waited here before.
    :raises Exception: the server does not want this task to run any more, or can't be reached.
    """
    context = client.task_instances.start(what.id, pid, datetime.now(tz=timezone.utc))
    most = conf.getint("workers", "missing_dag_retries", fallback=3)
    if context.next_method:
        return PutOff.WAITS_HERE if waited < most else PutOff.USED_UP
    if _counted(client, what, context.task_reschedule_count or 0) >= most:
        return PutOff.USED_UP
    now = datetime.now(tz=timezone.utc)
    delay = timedelta(seconds=put_off_delay())
    client.task_instances.reschedule(what.id, comms.RescheduleTask(reschedule_date=now + delay, end_date=now))
    return PutOff.RESCHEDULED


def put_off_delay() -> int:
    """In seconds."""
    return int(conf.getint("workers", "missing_dag_retry_delay", fallback=60))


def wait_alive(client: Client, what: Any, *, pid: int, seconds: float) -> None:
    """Wait, and tell the server that the task lives, which also renews the token.

    :raises Exception: the server does not want this task to run any more.
    """
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _SIGN_OF_LIFE))
        client.task_instances.heartbeat(what.id, pid)


def _counted(client: Client, what: Any, reschedules: int) -> int:
    """How often this try has been put off before; this time is counted. Without the store, the number of all reschedules."""
    store = client.task_state_store
    try:
        before = _read(store.get(what.id, KEY), str(what.id))
        forget = datetime.now(tz=timezone.utc) + _FORGET_AFTER
        store.set(what.id, KEY, {"try": str(what.id), "times": before + 1}, expires_at=forget)
    except (httpx.HTTPError, ValueError) as error:
        log.warning("How often a try was put off can't be counted; all its reschedules count instead", error=str(error))
        return reschedules
    # The task can write there, too.
    return min(before, reschedules)


def _read(answer: Any, try_id: str) -> int:
    match getattr(answer, "value", None):
        case {"try": str(named), "times": int(times)} if named == try_id and times > 0:
            return times
    return 0
