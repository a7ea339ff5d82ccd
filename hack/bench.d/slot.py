"""slot: from a task's last message to the release of its executor slot, and stock Airflow's beside it.

Each sample is a whole task: Airflow's supervisor, a container, an operator that does nothing. A stand-in for the API
server's client answers the supervisor, and notes when it is told that the task has succeeded. The slot is released when
the coordinator returns. Stock's is the same task in a forked process, in turns with ours.
"""

from __future__ import annotations

import os
import time
import uuid
from collections import defaultdict
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from unittest.mock import MagicMock, patch

from private_daemon import start_daemon, stop_daemon, test_image
from samples import Report, progress, spread, step

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from contextlib import ExitStack
    from pathlib import Path

WARM_UP = 1
OURS, STOCK = "in a container", "stock, in a fork"
DAG = """\
from airflow.sdk import dag, task


@dag(schedule=None)
def bench():
    @task
    def nothing(): ...

    nothing()


bench()
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--number", "-n", type=int, default=20, help="tasks of each, after a warm-up (20)")
    parser.add_argument("--backend", default="containerd", choices=["containerd", "docker"])


def run(options: argparse.Namespace, directory: Path, undo: ExitStack) -> Report:
    image = test_image("main")
    progress.print(f"Starting a private {options.backend} and importing {image.name}…")
    undo.callback(stop_daemon, directory / "d")
    daemon = start_daemon(options.backend, directory / "d")
    with daemon.connect(directory / "state") as runtime:
        runtime.import_image(image.archive)
    dags = directory / "dags"
    dags.mkdir(mode=0o755)
    (dags / "bench.py").write_text(DAG)
    # Before Airflow is imported, which happens below for the first time.
    os.environ.update(
        {
            "AIRFLOW_HOME": str(directory / "airflow"),
            "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__TASK_EXECUTION_RUNTIME": options.backend,
            f"AIRFLOW__{options.backend.upper()}_RUNTIME__SOCKET_PATH": daemon.socket,
            "AIRFLOW__CONTAINER_RUNTIME__IMAGE": image.name,
            "AIRFLOW__CONTAINER_RUNTIME__NETWORK": "none",
            "AIRFLOW__CONTAINER_RUNTIME__STATE_DIR": str(directory / "state"),
            "AIRFLOW__LOGGING__LOGGING_LEVEL": "ERROR",
        }
    )
    from airflow.sdk.execution_time.coordinator import _PythonCoordinator

    from airflow_isolation.integration.coordinator import ContainerCoordinator

    coordinators = {OURS: ContainerCoordinator(backend=options.backend), STOCK: _PythonCoordinator()}
    held: dict[str, list[float]] = {name: [] for name in coordinators}
    stages: dict[str, list[float]] = defaultdict(list)
    for turn in range(WARM_UP + options.number):
        for name, coordinator in coordinators.items():
            step(f"Task {turn + 1} of {WARM_UP + options.number}, {name}")
            parts = slot_held(coordinator)
            if turn < WARM_UP:
                continue
            held[name].append(sum(parts.values()))
            for part, seconds in parts.items():
                if name == OURS:
                    stages[part].append(seconds)
    step("")
    ours, stock = spread(held)
    return Report(
        benchmark="slot",
        series=(ours, *spread(stages, part_of=OURS), stock),
        versions={options.backend: daemon.version, "airflow": version("apache-airflow")},
    )


def slot_held(coordinator: Any) -> dict[str, float]:
    """Run one task; the seconds from its last message to the coordinator's return, in parts."""
    import structlog
    from airflow.executors.workloads.base import BundleInfo
    from airflow.sdk.api.datamodels._generated import TaskInstance

    succeeded: list[float] = []
    client = MagicMock(name="the API server's client")
    client.task_instances.start.return_value = _context()
    client.task_instances.succeed.side_effect = lambda *_, **__: succeeded.append(time.monotonic())
    with _removal() as removal:
        outcome = coordinator.execute_task(
            what=TaskInstance(
                id=uuid.uuid4(),
                dag_version_id=uuid.uuid4(),
                dag_id="bench",
                task_id="nothing",
                run_id="bench",
                try_number=1,
            ),
            dag_rel_path="bench.py",
            bundle_info=BundleInfo(name="dags-folder", version=None),
            client=client,
            logger=structlog.get_logger("bench"),
            subprocess_logs_to_stdout=False,
        )
        released = time.monotonic()
    if not succeeded:
        raise RuntimeError(f"The task did not succeed but ended as {outcome.final_state}, {outcome.exit_code}")
    began, ended = removal or (released, released)
    return {
        "until its process has ended": began - succeeded[-1],
        "removal of the container": ended - began,
        "clean-up of left-overs, closing": released - ended,
    }


@contextmanager
def _removal() -> Iterator[list[float]]:
    """When the first ``Workload.close`` began and ended; later ones have nothing left to do."""
    from airflow_isolation.bridge.workload import Workload

    moments: list[float] = []
    close = Workload.close

    def timed(workload: Workload) -> None:
        began = time.monotonic()
        close(workload)
        if not moments:
            moments.extend((began, time.monotonic()))

    with patch.object(Workload, "close", timed):
        yield moments


def _context() -> Any:
    from airflow.sdk.api.datamodels._generated import DagRun, TIRunContext

    now = datetime.now(timezone.utc)
    run = DagRun.model_validate(
        {
            "dag_id": "bench",
            "run_id": "bench",
            "logical_date": now,
            "data_interval_start": now,
            "data_interval_end": now,
            "run_after": now,
            "start_date": now,
            "end_date": None,
            "run_type": "manual",
            "state": "running",
            "consumed_asset_events": [],
            "partition_key": None,
        }
    )
    return TIRunContext(dag_run=run, max_tries=0)
