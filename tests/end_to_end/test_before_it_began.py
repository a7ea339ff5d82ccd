"""What is killed before user code may have run is put off and runs once; what is killed after that has failed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.processes import wait_until

from airflow_isolation.integration.seams.put_off import KEY
from airflow_isolation.runtime import labels
from airflow_isolation.runtime.connect import connect

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Protocol

    from tests.conftest import Daemon
    from tests.end_to_end.airflow_processes import Airflow

    from airflow_isolation.runtime.interface import Container, ContainerRuntime

    class Kill(Protocol):
        __name__: str

        def __call__(self, runtime: ContainerRuntime, container: Container, /) -> None: ...


pytestmark = pytest.mark.usefixtures("quiet")

#: The first that Python imports. The agent has it, too, but is not the one to be held.
HOLD = """
import os, pathlib, sys, time
if "run" in sys.orig_argv:
    held = os.environ["HELD"]
    pathlib.Path(held + ".here").touch()
    deadline = time.monotonic() + 120
    while not pathlib.Path(held + ".go").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
"""


def through_the_daemon(runtime: ContainerRuntime, container: Container) -> None:
    runtime.kill(container.id, signal.SIGKILL, everyone=True)


def process_1(_: ContainerRuntime, container: Container) -> None:
    os.kill(container.pid, signal.SIGKILL)


def its_only_child(_: ContainerRuntime, container: Container) -> None:
    (child,) = Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)


def shim(_: ContainerRuntime, container: Container) -> None:
    status = Path(f"/proc/{container.pid}/status").read_text()
    os.kill(int(status.partition("PPid:")[2].split()[0]), signal.SIGKILL)


KILLS: list[Kill] = [through_the_daemon, process_1, its_only_child, shim]


@pytest.fixture
def runtime(backend: str, daemon: Daemon, state_dir: Path) -> Iterator[ContainerRuntime]:
    with connect(backend, socket_path=str(daemon.socket), namespace="airflow", state_dir=state_dir) as runtime:
        yield runtime


def kill_held(airflow: Airflow, runtime: ContainerRuntime, dag_id: str, held: str, kill: Kill) -> None:
    """Kill the task where it is held, and hold it no more after that."""
    site = airflow.shared / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(HOLD)
    for name in ("here", "go"):
        (airflow.shared / f"{held}.{name}").unlink(missing_ok=True)
    airflow.trigger(dag_id, kill.__name__)
    airflow.wait_for_file(f"{held}.here", 120)
    # By now the server knows that the task runs, and the task has been sent what it is to do.
    wait_until(
        lambda: airflow.task_instances(dag_id, kill.__name__)[0]["state"] == "running", 60, "the state of the task"
    )
    (container,) = runtime.list({labels.DAG_ID: dag_id, labels.RUN_ID: kill.__name__})
    kill(runtime, runtime.get(container.id))
    (airflow.shared / f"{held}.go").touch()


@pytest.mark.parametrize("kill", KILLS)
def test_killed_while_airflow_is_imported_it_is_put_off_and_runs_once(
    airflow: Airflow, runtime: ContainerRuntime, kill: Kill
) -> None:
    kill_held(airflow, runtime, "imports_slowly", "imports", kill)
    run = airflow.finished("imports_slowly", kill.__name__)
    assert run.states == {"begins": "success"}
    assert run.tasks["begins"].try_number == 1
    assert run.tasks["begins"].said("it will be tried again and no try is used up")
    assert "before any of its code ran" in run.tasks["begins"].text
    assert (airflow.shared / f"begins.{kill.__name__}").read_text() == "once\n"
    # Where every host finds it.
    task = f"/dags/imports_slowly/dagRuns/{kill.__name__}/taskInstances/begins"
    kept = airflow.call("GET", f"{task}/state-store/{KEY}")
    assert kept["value"] == {"try": run.tasks["begins"].details["id"], "times": 1}


def test_killed_while_its_dag_file_is_read_it_has_failed(airflow: Airflow, runtime: ContainerRuntime) -> None:
    """A DAG file is user code: nobody can tell what it has done by then."""
    kill_held(airflow, runtime, "reads_slowly", "reads", process_1)
    run = airflow.finished("reads_slowly", "process_1")
    assert run.states == {"begins": "failed"}
    assert run.tasks["begins"].said("ended from outside")
    assert "out of memory" not in run.tasks["begins"].text
    assert not run.tasks["begins"].said("no try is used up")
