"""Tasks that end badly, or would leave something behind."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Any

from airflow.providers.standard.operators.bash import BashOperator
from airflow.providers.standard.triggers.file import FileTrigger
from airflow.sdk import BaseOperator, dag, get_current_context, task

SHARED = Path("/shared")


@dag(schedule=None)
def segfault() -> None:
    @task
    def reads_null() -> None:
        ctypes.string_at(0)

    reads_null()


@dag(schedule=None)
def grandchildren() -> None:
    # The numbers make these processes findable on the host; `sleep` reads them as seconds. They must not hold the pipe
    # that BashOperator reads to its end.
    BashOperator(
        task_id="leaves_processes",
        bash_command="exec 3>&1 >/dev/null 2>&1; setsid sleep 86411 3>&- & nohup sleep 86412 3>&- & "
        "(setsid sh -c 'sleep 86413 & sleep 86413' 3>&- &); echo left >&3",
    )

    @task
    def daemonizes() -> str:
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
                os.execlp("sleep", "sleep", "86414")
            os._exit(0)
        os.wait()
        return "left"

    daemonizes()


def given_name(context: Any) -> str:
    """What the test calls this run; the files by which they talk begin with it."""
    return str(context["dag_run"].conf["name"])


class Killable(BaseOperator):
    """Says through the shared volume that it runs, and that its on_kill was called."""

    def execute(self, context: Any) -> None:
        self.name = given_name(context)
        (SHARED / f"{self.name}.running").write_text(str(os.getpid()))
        time.sleep(600)

    def on_kill(self) -> None:
        (SHARED / f"{self.name}.killed").write_text(f"{os.getpid()} {Path('/proc/1/comm').read_text().strip()}")
        time.sleep(6)  # longer than Airflow's supervisor would wait, and less than its stop_grace_period
        self.log.info("on_kill has done its work")
        raise SystemExit(1)


@dag(schedule=None)
def killable() -> None:
    Killable(task_id="waits", executor_config={"container": {"stop_grace_period": 30}})


@dag(schedule=None)
def patient() -> None:
    """Runs until the test says that it may end."""

    @task
    def waits() -> str:
        name = given_name(get_current_context())
        (SHARED / f"{name}.running").write_text("")
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if (SHARED / f"{name}.finish").exists():
                print("I was told to finish")
                return "finished"
            time.sleep(0.1)
        raise TimeoutError("Nobody told me to finish")

    waits()


class Job(BaseOperator):
    """Is submitted, waits in the triggerer for a file of the host, and goes on."""

    def execute(self, context: Any) -> None:
        name = given_name(context)
        with (SHARED / f"{name}.submitted").open("a") as submitted:
            submitted.write("once\n")
        trigger = FileTrigger(filepath=f"$shared/{name}.go", poke_interval=0.5)
        self.defer(trigger=trigger, method_name="resume", kwargs={"given": "kept over the wait"})

    def resume(self, context: Any, event: Any, given: str) -> list[str]:
        return [given, str(event)]


@dag(schedule=None)
def resumed() -> None:
    Job(task_id="waits")


@dag(schedule=None)
def heeds_nothing() -> None:
    """Ignores every signal that can be ignored."""

    @task
    def ignores() -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        name = given_name(get_current_context())
        (SHARED / f"{name}.running").write_text("")
        time.sleep(600)

    ignores()


@dag(schedule=None)
def impersonates() -> None:
    """Wants to become another user, as Airflow does it."""

    @task(run_as_user="somebody")
    def becomes_somebody() -> None:
        print("user code ran")

    becomes_somebody()


impersonates()
segfault()
grandchildren()
killable()
patient()
resumed()
heeds_nothing()
