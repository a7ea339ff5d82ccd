"""A whole task of Airflow on a worker that is an ordinary user and has this host's node, not the daemon's socket."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest
from tests.airflow_home import environment_of_its_own, own_cgroup_parent, short_directory
from tests.end_to_end.airflow_processes import copy_dags, running_airflow
from tests.end_to_end.conftest import START_MODE, assert_nothing_left, end_zygotes, options_for, provide_images
from tests.end_to_end.ordinary_user import as_ordinary_user
from tests.end_to_end.test_refused import without_scheduler
from tests.processes import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import ImageArchive, StartDaemon

UID, GID = 12347, 12348


@contextmanager
def node(environment: dict[str, str], socket: Path, output: Path) -> Iterator[None]:
    """`airflow containers node`, as root."""
    with output.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "airflow", "containers", "node"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    try:
        wait_until(lambda: socket.exists() or process.poll() is not None, 120, "the node")
        assert process.poll() is None, output.read_text()
        yield
    finally:
        process.terminate()
        assert process.wait(60) == 0, output.read_text()


def test_a_task_of_an_ordinary_user_s_executor_is_forked_by_the_node(
    start_containerd: StartDaemon, images: dict[str, str], image_archive: ImageArchive
) -> None:
    daemon = start_containerd(group=0)
    assert daemon.socket.stat().st_mode & 0o007 == 0, "the worker may not use the daemon's socket"
    with ExitStack() as stack:
        place = stack.enter_context(short_directory("ai-e2e-"))
        parent = stack.enter_context(own_cgroup_parent("ai-e2e-"))
        home, roots_home, state_dir = (place / name for name in ("home", "root", "state"))
        provide_images("containerd", daemon, place, image_archive, ("main",))
        copy_dags(home / "dags", images)
        for other in (home / "dags").iterdir():
            if other.name != "plain.py":
                other.unlink()
        roots_home.mkdir(mode=0o700)
        for path in (home, *home.rglob("*")):
            os.chown(path, UID, GID)
        home.chmod(0o755)
        socket = place / "node" / "node.sock"
        roots = {
            **environment_of_its_own(roots_home, roots_home / "unused.db"),
            **options_for("containerd", daemon, state_dir, images["main"]),
            "AIRFLOW__CONTAINER_RUNTIME__CGROUP_PARENT": parent,
            "AIRFLOW__CONTAINER_RUNTIME__NODE": str(socket),
            "AIRFLOW__CONTAINER_RUNTIME__NODE_CLIENTS": str(UID),
        }
        shared = place / "shared"
        shared.mkdir()
        options = {
            "USER": "worker",  # the uid has no name, and Airflow wants one
            "AIRFLOW__CORE__TASK_EXECUTION_RUNTIME": "containerd",
            "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
            "AIRFLOW__CONTAINER_RUNTIME__NODE": str(socket),
        }
        user = as_ordinary_user(UID, GID)
        with (
            node(roots, socket, place / "node.out"),
            running_airflow("containerd", home, shared=shared, options=options, user=user) as airflow,
        ):
            airflow.wait_for_dag("plain")
            state, log = without_scheduler(airflow, "2026-01-01")
            assert state == "success", log
            (started,) = [event for event in map(json.loads, log.splitlines()) if "start_mode" in event]
            assert started["start_mode"] == START_MODE, log
            assert "Task ended with exit code 0" in log
        end_zygotes("containerd", daemon, state_dir)
        assert_nothing_left(daemon, state_dir, parent)


@pytest.fixture(autouse=True)
def nothing_left() -> None:
    """The test looks itself: its daemon is its own."""
