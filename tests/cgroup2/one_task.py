"""A worker's part in one task and nothing more: Airflow's own supervisor, and an API that agrees to everything.

    python one_task.py LOG_FILE

Airflow's client has such an API itself (dry_run); only what it tells of the run is too old for its own task runner.
"""

from __future__ import annotations

import sys
import uuid

import httpx
from airflow.executors.workloads.base import BundleInfo
from airflow.sdk.api.client import Client
from airflow.sdk.api.datamodels._generated import TaskInstance
from airflow.sdk.execution_time.supervisor import supervise_task

DATE = "2026-01-01T00:00:00Z"
RUN = {
    "dag_run": {
        "dag_id": "greedy",
        "run_id": "once",
        "logical_date": DATE,
        "run_after": DATE,
        "start_date": DATE,
        "end_date": None,
        "data_interval_start": None,
        "data_interval_end": None,
        "partition_key": None,
        "run_type": "manual",
        "state": "running",
        "consumed_asset_events": [],
    },
    "max_tries": 0,
    "should_retry": False,
}


def agree(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json=RUN if request.url.path.endswith("/run") else {})


def main(log_file: str) -> int:
    return supervise_task(
        ti=TaskInstance(
            id=uuid.uuid4(),
            dag_version_id=uuid.uuid4(),
            dag_id="greedy",
            run_id="once",
            task_id="use_all",
            try_number=1,
            map_index=-1,
        ),
        bundle_info=BundleInfo(name="dags-folder", version=None),
        dag_rel_path="greedy.py",
        token="",
        client=Client(base_url=None, dry_run=True, token="", transport=httpx.MockTransport(agree)),
        log_path=log_file,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
