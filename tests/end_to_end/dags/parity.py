"""DAGs that know nothing of containers: their states and XComs are the same with the flag empty, docker and containerd."""

from __future__ import annotations

import logging
import os
import signal
import time
from datetime import timedelta
from typing import Any

from airflow.providers.standard.operators.bash import BashOperator
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.providers.standard.triggers.temporal import TimeDeltaTrigger
from airflow.sdk import BaseHook, BaseOperator, Variable, dag, get_current_context, task
from airflow.sdk.exceptions import AirflowSkipException

LINES = 10_000


@dag(schedule=None)
def exchange() -> None:
    """XCom both ways, mapped tasks over an upstream's answer, explicit keys."""

    @task
    def numbers() -> list[int]:
        get_current_context()["ti"].xcom_push("greeting", {"text": "grüße", "list": [1, None, 2.5]})
        return [1, 2, 3]

    @task
    def double(x: int) -> int:
        return 2 * x

    @task
    def total(doubled: Any) -> dict[str, Any]:
        ti = get_current_context()["ti"]
        return {"sum": sum(doubled), "greeting": ti.xcom_pull(task_ids="numbers", key="greeting")}

    total(double.expand(x=numbers()))


@dag(schedule=None)
def lookups() -> None:
    """Variables and connections, from the database and from the worker's own environment."""

    @task
    def variables() -> list[str]:
        Variable.set("written_by_task", "by the task")
        return [
            Variable.get("from_database"),
            Variable.get("from_worker"),
            Variable.get("written_by_task"),
            Variable.get("nowhere", default="not there"),
        ]

    @task
    def connections() -> list[list[Any]]:
        found = [BaseHook.get_connection(name) for name in ("from_database", "from_worker")]
        return [[c.conn_type, c.host, c.login, c.password, c.port, c.extra_dejson] for c in found]

    @task
    def missing_connection() -> None:
        BaseHook.get_connection("nowhere")

    variables()
    connections()
    missing_connection()


def report(context: Any) -> None:
    """A callback of a task; it runs where the task runs."""
    logging.getLogger(__name__).info("callback for try %s", context["ti"].try_number)


@dag(schedule=None)
def failure() -> None:
    @task(on_failure_callback=report)
    def fails() -> None:
        raise ValueError("the task's own mistake")

    @task
    def never() -> None:
        pass

    @task(trigger_rule="all_done")
    def afterwards() -> str:
        return "ran"

    failed = fails()
    failed >> never()
    failed >> afterwards()


@dag(schedule=None)
def retry() -> None:
    @task(retries=1, retry_delay=timedelta(seconds=1), on_retry_callback=report)
    def second_time_lucky() -> int:
        number: int = get_current_context()["ti"].try_number
        if number == 1:
            raise ValueError("not yet")
        return number

    second_time_lucky()


@dag(schedule=None)
def skips() -> None:
    @task
    def skipped() -> None:
        raise AirflowSkipException

    @task.branch
    def choose() -> str:
        return "left"

    skipped()
    choose() >> [EmptyOperator(task_id="left"), EmptyOperator(task_id="right")]


class Deferring(BaseOperator):
    """Waits in the triggerer, then goes on where it left."""

    def execute(self, context: Any) -> None:
        # Longer than a busy scheduler takes to hear from its executor that this part has ended: one that hears it when
        # the trigger has fired, and the next part is not queued yet, takes the task for killed from outside.
        trigger = TimeDeltaTrigger(timedelta(seconds=30))
        self.defer(trigger=trigger, method_name="resume", kwargs={"given": "kept over the wait"})

    def resume(self, context: Any, event: Any, given: str) -> list[str]:
        return [given, type(event).__name__]


@dag(schedule=None)
def deferral() -> None:
    Deferring(task_id="waits")


@dag(schedule=None)
def abrupt() -> None:
    """Ends that Python has no say in."""

    @task
    def exits() -> None:
        os._exit(3)

    @task
    def kills_itself() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    exits()
    kills_itself()


@dag(schedule=None)
def timeouts() -> None:
    @task(execution_timeout=timedelta(seconds=1))
    def too_slow() -> None:
        time.sleep(300)

    too_slow()


@dag(schedule=None)
def lines() -> None:
    @task
    def many() -> None:
        log = logging.getLogger("many")
        for number in range(LINES):
            print(f"printed {number}")
            log.info("logged %d", number)

    many()


@dag(schedule=None)
def bash() -> None:
    BashOperator(task_id="answers", bash_command="echo first; echo $ANSWER", env={"ANSWER": "last"}, append_env=True)
    BashOperator(task_id="fails", bash_command="exit 7")
    BashOperator(task_id="skips", bash_command="exit 99")


exchange()
lookups()
failure()
retry()
skips()
deferral()
abrupt()
timeouts()
lines()
bash()
