"""Tasks that can be held at two moments: while Airflow is imported, and while this file is read."""

from __future__ import annotations

import os
import time
from pathlib import Path

from airflow.sdk import dag, get_current_context, task

if held := os.environ.get("HELD_WHILE_THE_FILE_IS_READ"):
    Path(f"{held}.here").touch()
    deadline = time.monotonic() + 120
    while not Path(f"{held}.go").exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def write_down() -> None:
    run_id = get_current_context()["run_id"]
    with Path(f"/shared/begins.{run_id}").open("a") as witness:
        witness.write("once\n")


# The directory on PYTHONPATH has a sitecustomize, which the test writes.
@dag(schedule=None)
def imports_slowly() -> None:
    @task(executor_config={"container": {"environment": {"PYTHONPATH": "/shared/site", "HELD": "/shared/imports"}}})
    def begins() -> None:
        write_down()

    begins()


@dag(schedule=None)
def reads_slowly() -> None:
    @task(executor_config={"container": {"environment": {"HELD_WHILE_THE_FILE_IS_READ": "/shared/reads"}}})
    def begins() -> None:
        write_down()

    begins()


imports_slowly()
reads_slowly()
