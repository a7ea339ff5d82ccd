"""With the flag set nothing is parsed outside of a container: what can't be done right is not done, and says so."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from tests.dag_processing.dag_processor import HEALTHY, dag_processor
from tests.dag_processing.test_trouble import CALLBACK, CALLS_BACK, TRIED_AGAIN
from tests.processes import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.dag_processing.dag_processor import DagProcessor

FLAG = {"AIRFLOW__CORE__SCHEDULER_DAG_PARSING_RUNTIME": "containerd"}


@pytest.fixture(scope="module")
def unstarted(place: Path) -> Iterator[DagProcessor]:
    """An Airflow whose containerd is not there."""
    home = place / "no-daemon-home"
    options = {
        **FLAG,
        "AIRFLOW__CONTAINER_RUNTIME__IMAGE": "localhost/some/image:1",
        "AIRFLOW__CONTAINER_RUNTIME__STATE_DIR": str(place / "no-daemon-state"),
        "AIRFLOW__CONTAINERD_RUNTIME__SOCKET_PATH": str(place / "no-daemon.sock"),
    }
    with dag_processor(home, options, start=False) as processor:
        yield processor


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"AIRFLOW__CORE__SCHEDULER_DAG_PARSING_RUNTIME": "podman"}, ("podman", "containerd or docker")),
        ({"AIRFLOW__CONTAINER_RUNTIME__IMAG": "x"}, ("IMAG", "Did you mean image?")),
        ({"AIRFLOW__SCHEDULER_DAG_PARSING_CONTAINER_RUNTIME__PARSE_CONTAINERS": "many"}, ("parse_containers", "many")),
        ({"AIRFLOW__CONTAINER_RUNTIME_POLICY__ALLOWED_VARIABLES": "x"}, ("allowed_variables", "FILE:ID")),
    ],
    ids=["flag", "unknown key", "wrong value", "policy"],
)
def test_a_mistake_of_the_administrators_stops_the_dag_processor(
    unstarted: DagProcessor, options: dict[str, str], words: tuple[str, ...]
) -> None:
    done = unstarted.run("dag-processor", "--num-runs", "1", **options)
    assert done.returncode != 0
    assert all(word.lower() in done.stderr.lower() for word in words), done.stderr[-2000:]


PROGRAMS = {
    "manager": "from airflow.dag_processing.manager import DagFileProcessorManager as M; M(max_runs=1)",
    "process": "from airflow.dag_processing.processor import DagFileProcessorProcess as P; P.start(path='x')",
    "unknown Airflow": "from airflow.dag_processing.manager import DagFileProcessorManager as M; del M.end\n"
    "import airflow.cli.commands.dag_processor_command",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_stock_parsing_is_refused(unstarted: DagProcessor, name: str) -> None:
    with pytest.raises(AssertionError, match=r"no DAG file may be parsed|has no .*DagFileProcessorManager\.end"):
        unstarted.python(f"import airflow.settings; airflow.settings.initialize()\n{PROGRAMS[name]}", flag="containerd")


def test_callbacks_that_could_not_run_are_in_the_database_again_after_the_end(unstarted: DagProcessor) -> None:
    unstarted.write("waits.py", CALLS_BACK.format(dag_id="waits", mark="here"))
    unstarted.write("healthy.py", HEALTHY.format(dag_id="healthy"))
    unstarted.python(CALLBACK, "dags-folder", "", "waits.py", "waits")
    unstarted.start()
    wait_until(
        lambda: any(event["event"] == TRIED_AGAIN for event in unstarted.log("waits.py")), 90, "the postponement"
    )
    unstarted.wait(lambda: unstarted.database.rows("select * from callback") == [], "the callback's being fetched")
    time.sleep(1)
    assert unstarted.stop() == 0
    assert len(unstarted.database.rows("select * from callback")) == 1
