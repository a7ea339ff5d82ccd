"""A task of Airflow on cgroup v2, whole: supervisor, container, task runner, and what its log says in the end.

In the container there is this machine's own Python with Airflow, mounted: to unpack an image with one takes longer here
than all else together.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from tests.conftest import running

import airflow_isolation
from airflow_isolation.runtime.containerd import ContainerdRuntime

if TYPE_CHECKING:
    from tests.conftest import ImageArchive, ImageName

HERE = Path(__file__).parent
SECONDS = 400
#: Of the virtual environment, in the container.
PREFIX = "/srv/airflow"


@pytest.mark.timeout(600)
def test_a_task_over_its_memory_is_named_in_its_log(
    image_archive: ImageArchive, image_name: ImageName, tmp_path: Path
) -> None:
    log = tmp_path / "task.log"
    volumes = tmp_path / "volumes.yaml"
    volumes.write_text(yaml.safe_dump([f"{source}:{target}:ro" for target, source in python_of_this_machine().items()]))
    with running("containerd", "--version=1.6") as daemon:
        state = daemon.directory / "ours"
        with ContainerdRuntime(str(daemon.socket), state_dir=state, timeout=120) as runtime:
            runtime.import_image(image_archive("no-python"))
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW_")}
        done = subprocess.run(
            [sys.executable, str(HERE / "one_task.py"), str(log)],
            env={
                **inherited,
                "AIRFLOW_HOME": str(tmp_path / "home"),
                "AIRFLOW__CORE__DAGS_FOLDER": str(HERE / "dags"),
                "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
                "AIRFLOW__CORE__TASK_EXECUTION_RUNTIME": "containerd",
                "AIRFLOW__CONTAINERD_RUNTIME__SOCKET_PATH": str(daemon.socket),
                "AIRFLOW__CONTAINER_RUNTIME__STATE_DIR": str(state),
                "AIRFLOW__CONTAINER_RUNTIME__IMAGE": image_name("no-python"),
                "AIRFLOW__CONTAINER_RUNTIME__IMAGE_PULL_POLICY": "never",
                "AIRFLOW__CONTAINER_RUNTIME__VOLUME_MOUNT_YAML": str(volumes),
                "AIRFLOW__CONTAINER_RUNTIME__PYTHON": f"{PREFIX}/bin/python",
                "AIRFLOW__CONTAINER_RUNTIME__RUN_AS_USER": "50000:0",
                "AIRFLOW__CONTAINER_RUNTIME__NETWORK": "none",
                "AIRFLOW__CONTAINER_RUNTIME__START_TIMEOUT": "5m",
                "AIRFLOW__CONTAINER_RUNTIME__START_MODE": "fresh",
                "AIRFLOW__TASK_EXECUTION_CONTAINER_RUNTIME__BUDGET_MEMORY": "1Gi",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        with ContainerdRuntime(str(daemon.socket), state_dir=state, timeout=120) as runtime:
            assert runtime.list() == ()
    assert log.exists(), done.stderr
    said = [str(json.loads(line)["event"]) for line in log.read_text().splitlines()]
    killing = next((line for line in said if "memory ran out" in line), f"not said, only: {log.read_text()}")
    assert killing.startswith(
        "The kernel killed this workload because memory ran out: it reached its own limit, memory = 256 MiB; its peak was "
        "256 MiB (100 %)."
    )
    assert re.search(r" Killed: (airflow worker|python\S*) \(process \d+\)\. Raise resources\.memory\.$", killing), (
        killing
    )
    assert said[-1].startswith("Task ended with signal SIGKILL: "), said
    assert re.search(r"memory peak 256 MiB of 256 MiB \(100 %\); OOM kills 1; processes peak \d+ of 64", said[-1]), said
    assert not Path("/sys/fs/cgroup/airflow").exists()


def python_of_this_machine() -> dict[str, str]:
    """What a container needs of it: by the directory there, the directory here. Below /tmp the container has its own."""
    # Airflow looks for every provider that is installed, and so for this project, which may be installed in place.
    ours = str(Path(airflow_isolation.__file__).parents[1])
    # A virtual environment may have its packages elsewhere, and name the place in a .pth file.
    elsewhere = [place for place in sys.path if Path(place).is_dir() and not place.startswith(sys.prefix)]
    same = {place: place for place in ("/lib", "/lib64", "/usr/lib", sys.base_prefix, ours, *elsewhere)}
    return {target: os.path.realpath(source) for target, source in {**same, PREFIX: sys.prefix}.items()}
