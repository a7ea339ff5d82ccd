"""``airflow`` as people call it: a process of its own, with a home, a database and a private containerd."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.processes import run_to_end

from airflow_isolation.container_spec import ContainerSpec
from airflow_isolation.oci.identifier import new_container_id
from airflow_isolation.runtime import labels
from airflow_isolation.runtime.containerd import ContainerdRuntime

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Daemon, ImageArchive, ImageName

    from airflow_isolation.runtime.interface import Container

SECONDS = 240

DAG = """
from airflow.sdk import dag, task
import atexit
import os

@dag(schedule=None)
def sales():
    @task(executor_config={"container": {"environment": {"REGION": "eu"}}})
    def load():
        print("process", os.getpid(), "in", os.environ["REGION"])

    @task
    def fail():
        raise ValueError("on purpose")

    @task
    def dies_late():
        atexit.register(os.kill, os.getpid(), 9)  # after it has reported its success

    load(), fail(), dies_late()

sales()
"""

METADATA = """
container:
  environment: {team: sales, api_password: hush}
  tasks:
    "fa*": {resources: {memory: 600Mi}}
"""

Airflow = Callable[..., "subprocess.CompletedProcess[str]"]
MakeContainer = Callable[..., "Container"]


@pytest.fixture(scope="session")
def state_dir() -> Iterator[Path]:
    # Not pytest's tmp_path: sockets lie below it, and users of containers have to reach them.
    with tempfile.TemporaryDirectory(prefix="ai-cli-", dir="/var/tmp") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.fixture(scope="session")
def environment(state_dir: Path, private_containerd: Daemon, image_name: ImageName) -> dict[str, str]:
    """A home with one DAG, whose container settings come from four places."""
    home = state_dir / "home"
    (home / "dags").mkdir(parents=True)
    (home / "dags/sales.py").write_text(DAG)
    (home / "dags/sales.yaml").write_text(METADATA)
    # Where pytest runs under another Airflow's settings, those are not ours.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW_", "AIRFLOW__"))}
    return {
        **inherited,
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CONTAINERD_RUNTIME__SOCKET_PATH": str(private_containerd.socket),
        "AIRFLOW__DOCKER_RUNTIME__SOCKET_PATH": str(state_dir / "docker.sock"),
        "AIRFLOW__CONTAINER_RUNTIME__STATE_DIR": str(state_dir / "state"),
        "AIRFLOW__CONTAINER_RUNTIME__IMAGE": image_name("main"),
        "AIRFLOW__CONTAINER_RUNTIME__NETWORK": "none",
        "NO_COLOR": "1",
    }


@pytest.fixture(scope="session")
def airflow(environment: dict[str, str]) -> Airflow:
    """``airflow("containers", "list")``: runs it and gives what it printed."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "airflow", *arguments]
        return run_to_end(command, {**environment, **variables}, timeout=SECONDS)

    return run


@pytest.fixture(scope="session")
def database(airflow: Airflow) -> None:
    """Airflow's metadata database, empty."""
    done = airflow("db", "migrate")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def runtime(private_containerd: Daemon, state_dir: Path) -> Iterator[ContainerdRuntime]:
    with ContainerdRuntime(str(private_containerd.socket), "airflow", state_dir / "state") as runtime:
        yield runtime


@pytest.fixture(scope="session")
def main_image(runtime: ContainerdRuntime, image_archive: ImageArchive, image_name: ImageName) -> Iterator[str]:
    """The test image, in the store; gone at the end."""
    runtime.import_image(image_archive("main"))
    yield image_name("main")
    runtime.remove_image(image_name("main"))


@pytest.fixture
def make_container(runtime: ContainerdRuntime, main_image: str) -> Iterator[MakeContainer]:
    """Makes containers that sleep; they are gone at the end."""
    with ExitStack() as stack:

        def make(owner: labels.Owner, *, started: bool = False, **label: str) -> Container:
            spec = ContainerSpec(
                image=main_image,
                argv=("python3", "-c", "print('one'); print('two', flush=True); import time; time.sleep(600)"),
                network="none",
                labels={
                    labels.OWNER: str(owner),
                    labels.PURPOSE: "task",
                    **{labels.PREFIX + k: v for k, v in label.items()},
                },
            )
            container = runtime.create(new_container_id("task"), spec)
            stack.callback(runtime.remove, container.id)
            if started:
                runtime.start(container.id)
            return container

        yield make


@pytest.fixture
def dead_owner() -> labels.Owner:
    """A worker that was killed."""
    process = subprocess.Popen(["sleep", "600"])
    owner = labels.Owner(os.uname().nodename, process.pid, labels._start_ticks(process.pid))
    process.send_signal(signal.SIGKILL)
    process.wait()
    return owner


@pytest.fixture(autouse=True)
def nothing_stays(runtime: ContainerdRuntime) -> Iterator[None]:
    yield
    # Nobody's but the host's: a task's zygote waits for the next.
    for zygote in runtime.list({labels.PURPOSE: "zygote"}):
        runtime.remove(zygote.id)
    runtime.remove_unused_roots()
    # Fixtures are torn down in reverse: what make_container made is gone by now.
    assert runtime.list() == ()
