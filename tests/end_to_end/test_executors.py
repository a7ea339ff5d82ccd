"""Every executor, on a worker that is an ordinary user whose group may use the daemon's socket; both flags are set.

The DAG processor is that user too, and parses in containers: files whose images hold different releases of one package,
and a bundle of Airflow's git provider, of which a container needs neither git nor the repository.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.end_to_end.airflow_processes import SCHEDULER, copy_dags, running_airflow
from tests.end_to_end.conftest import assert_nothing_left, options_for, provide_images
from tests.end_to_end.ordinary_user import as_ordinary_user
from tests.end_to_end.test_refused import without_scheduler
from tests.processes import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import ImageArchive, StartDaemon
    from tests.end_to_end.airflow_processes import Airflow, Run

UID, GID = 12345, 12346
CGROUP_PARENT = "ai-e2e-executors"
EDGE_EXECUTOR = "airflow.providers.edge3.executors.EdgeExecutor"
KINDS = ("main", "extra", "older-extra")
FROM_GIT = """
from airflow.sdk import dag, task

TEXT = "{text}"


@dag(schedule=None, tags=[TEXT])
def from_git():
    @task
    def tell():
        return TEXT

    tell()


from_git()
"""
EXECUTORS = ("LocalExecutor", "CeleryExecutor", "EdgeExecutor")


@pytest.fixture(scope="module")
def ordinary(start_containerd: StartDaemon, images: dict[str, str], image_archive: ImageArchive) -> Iterator[Airflow]:
    """An Airflow that never was root."""
    daemon = start_containerd(group=GID)
    directory = Path(tempfile.mkdtemp(prefix="ai-e2e-", dir="/var/tmp"))
    home, shared, state_dir = (directory / name for name in ("home", "shared", "state"))
    try:
        provide_images("containerd", daemon, directory, image_archive, KINDS)
        origin = directory / "origin"
        git(origin.parent, "init", "--quiet", "--initial-branch=main", str(origin))
        commit(origin, FROM_GIT.format(text="first"))
        here = Path(__file__).parent
        copy_dags(home / "dags", images, here / "dags_of_executors")
        shutil.copy(here / "dags" / "plain.py", home / "dags")
        for path in (shared, state_dir):
            path.mkdir()
        for path in (directory, *directory.rglob("*")):
            os.chown(path, UID, GID)
        directory.chmod(0o755)
        options = {
            **options_for("containerd", daemon, state_dir, images["main"]),
            "AIRFLOW__CORE__SCHEDULER_DAG_PARSING_RUNTIME": "containerd",
            "AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST": bundles(home / "dags", origin),
            "AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_STORAGE_PATH": str(home / "bundles"),
            "AIRFLOW__DAG_PROCESSOR__BUNDLE_REFRESH_CHECK_INTERVAL": "0",
            "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "2",
            "USER": "worker",  # the uid has no name, and Airflow wants one
            "AIRFLOW__CONTAINER_RUNTIME__RUN_AS_USER": "50000:0",
            "AIRFLOW__CONTAINER_RUNTIME__CGROUP_PARENT": CGROUP_PARENT,
            "AIRFLOW__CORE__EXECUTOR": f"LocalExecutor,CeleryExecutor,EdgeExecutor:{EDGE_EXECUTOR}",
            # Celery's broker can be a database, which needs no server.
            "AIRFLOW__CELERY__BROKER_URL": f"sqla+sqlite:///{home}/broker.db",
            "AIRFLOW__CELERY__RESULT_BACKEND": f"db+sqlite:///{home}/results.db",
            "AIRFLOW__CELERY__WORKER_CONCURRENCY": "1",
            "AIRFLOW__EDGE__API_ENABLED": "True",
            "AIRFLOW__EDGE__JOB_POLL_INTERVAL": "1",
            # Worker and server share the log folder here: what is pushed would be appended to what it was read from.
            "AIRFLOW__EDGE__PUSH_LOGS": "False",
            "AIRFLOW__EDGE__HEARTBEAT_INTERVAL": "2",
        }
        user = as_ordinary_user(UID, GID)
        with running_airflow("containerd", home, shared=shared, options=options, user=user, edge=True) as airflow:
            airflow.start(SCHEDULER)
            airflow.start("celery worker --skip-serve-logs")
            airflow.start("edge worker --concurrency 1")
            airflow.wait_for_dag("carried")
            yield airflow
        assert_nothing_left(daemon, state_dir, CGROUP_PARENT)
    finally:
        for path in Path("/sys/fs/cgroup").glob(f"*/{CGROUP_PARENT}"):
            with suppress(OSError):
                path.rmdir()
        if not os.environ.get("AIRFLOW_ISOLATION_KEEP"):
            shutil.rmtree(directory)


def bundles(dags: Path, origin: Path) -> str:
    local = "airflow.dag_processing.bundles.local.LocalDagBundle"
    git_bundle = "airflow.providers.git.bundles.git.GitDagBundle"
    return json.dumps(
        [
            {"name": "dags-folder", "classpath": local, "kwargs": {"path": str(dags)}},
            {"name": "git", "classpath": git_bundle, "kwargs": {"tracking_ref": "main", "repo_url": str(origin)}},
        ]
    )


def git(directory: Path, *arguments: str, user: int | None = None) -> str:
    """As the repository's owner: git reads none that is another's."""
    identity = {f"GIT_{who}_{what}": f"{who}@example" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(
        ["git", *arguments],
        cwd=directory,
        env={"PATH": os.environ["PATH"], "HOME": str(directory), **identity},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        user=user,
        group=user and GID,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def commit(origin: Path, text: str, user: int | None = None) -> str:
    """Commit a DAG file, and give the commit's hash."""
    file = origin / "from_git.py"
    file.write_text(text)
    git(origin, "add", file.name, user=user)
    git(origin, "commit", "--quiet", "--message=the DAG file", user=user)
    return git(origin, "rev-parse", "HEAD", user=user)


@pytest.fixture(scope="module")
def carried(ordinary: Airflow) -> Run:
    """The run of the one DAG."""
    ordinary.trigger("carried")
    return ordinary.finished("carried")


@pytest.mark.parametrize("executor", EXECUTORS)
def test_executor_config_reaches_the_container(carried: Run, executor: str) -> None:
    assert carried.tasks[executor].state == "success", carried.tasks[executor].text
    assert carried.xcoms[f"{executor}.return_value"] == [executor, executor.lower(), 50000]


def test_two_releases_of_one_package_are_parsed_and_run_beside_each_other(ordinary: Airflow) -> None:
    releases = {"holds_newer": "6.1", "holds_older": "6.0"}
    for dag_id in releases:
        ordinary.wait_for_dag(dag_id)
        ordinary.trigger(dag_id)
    for dag_id, release in releases.items():
        run = ordinary.finished(dag_id)
        assert run.xcoms == {"tell.return_value": release}, run.tasks["tell"].text
        parsed = ordinary.call("GET", f"/dags/{dag_id}")["tags"]
        assert [tag["name"] for tag in parsed] == [f"cowsay {release}"]
    assert ordinary.call("GET", "/importErrors")["import_errors"] == []


def test_a_task_of_a_git_bundle_runs_the_version_that_its_run_was_made_with(ordinary: Airflow) -> None:
    origin = ordinary.home.parent / "origin"
    first = git(origin, "rev-parse", "HEAD", user=UID)
    ordinary.wait_for_dag("from_git")
    ordinary.trigger("from_git")
    run = ordinary.finished("from_git")
    assert run.xcoms == {"tell.return_value": "first"}, run.tasks["tell"].text
    second = commit(origin, FROM_GIT.format(text="second"), user=UID)

    def versions() -> list[str]:
        return [each["bundle_version"] for each in ordinary.call("GET", "/dags/from_git/dagVersions")["dag_versions"]]

    wait_until(lambda: second in versions(), 60, "the second version of the DAG")
    assert set(versions()) == {first, second}
    # Again, now that the bundle has moved on.
    again = {"dag_run_id": "once", "dry_run": False, "only_failed": False, "reset_dag_runs": True}
    ordinary.call("POST", "/dags/from_git/clearTaskInstances", json=again)
    run = ordinary.finished("from_git")
    assert (run.tasks["tell"].try_number, run.xcoms) == (2, {"tell.return_value": "first"})
    ordinary.trigger("from_git", run_id="later")
    assert ordinary.finished("from_git", "later").xcoms == {"tell.return_value": "second"}


def test_a_user_by_name_is_refused_in_words(carried: Run) -> None:
    """Names stand in the image's /etc/passwd, and only root can mount an image to read it."""
    task = carried.tasks["named_user"]
    assert task.state == "failed"
    assert not task.said("user code ran")
    assert "airflow" in task.text
    assert "root" in task.text


def test_a_user_outside_of_the_sockets_group_is_told_so_in_the_task_log(ordinary: Airflow) -> None:
    """As containerd makes its socket when its configuration names no group: for root alone."""
    path = ordinary.home.parent / "closed.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        path.chmod(0o600)
        state, log = without_scheduler(
            ordinary,
            "2026-01-01",
            AIRFLOW__CORE__EXECUTOR="LocalExecutor",
            AIRFLOW__CONTAINERD_RUNTIME__SOCKET_PATH=str(path),
        )
    assert state == "failed"
    assert "The task could not be started in a container" in log
    assert f"containerd can't be reached: this process may not use the socket {path}" in log
    assert f"Run as root, or give uid {UID} access to {path} through a group" in log
