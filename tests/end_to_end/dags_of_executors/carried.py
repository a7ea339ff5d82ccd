"""The same task by each executor: what it asks for in executor_config must reach its container."""

from __future__ import annotations

import os
import socket
from typing import Any

from airflow.sdk import dag, task


@dag(schedule=None)
def carried() -> None:
    for executor in ("LocalExecutor", "CeleryExecutor", "EdgeExecutor"):
        asked = {"hostname": executor.lower(), "environment": {"FROM": executor}}

        @task(task_id=executor, executor=executor, executor_config={"container": asked})
        def tell() -> list[Any]:
            return [os.environ["FROM"], socket.gethostname(), os.getuid()]

        tell()

    @task(executor_config={"container": {"run_as_user": "airflow"}})
    def named_user() -> None:
        print("user code ran")

    named_user()


carried()
