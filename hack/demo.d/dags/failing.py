"""A task that fails, is tried again in a new container, and then runs its on_failure_callback in the last one."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

from airflow.sdk import dag, task


def report(context: dict[str, Any]) -> None:
    print("on_failure_callback ran in container", socket.gethostname(), "after try", context["ti"].try_number)


@dag(schedule=None)
def failing() -> None:
    @task(retries=1, retry_delay=timedelta(seconds=1), on_failure_callback=report)
    def breaks() -> None:
        raise RuntimeError("This failure belongs to the demonstration")

    breaks()


failing()
