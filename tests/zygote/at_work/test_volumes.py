"""Volumes in the user namespace of an image: files belong to whom they belong on the host, by a runc that maps ids."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from tests.zygote.at_work.conftest import NAMESPACE, Running, Task
from tests.zygote.at_work.test_reach import fork_by_hand

from airflow_isolation.bridge import workload as workloads
from airflow_isolation.bridge.workload import launch
from airflow_isolation.container_spec import Mount
from airflow_isolation.oci.identifier import new_container_id
from airflow_isolation.runtime.connect import connect

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.zygote.at_work.conftest import Worker

pytestmark = [pytest.mark.root, pytest.mark.parametrize("form", ["idmapped"], indirect=True)]

#: The image's user, whose group is root's.
OURS = 50000
SOMEBODY = 1234

#: Says what the task may do with the files of the volume, and whose they are.
AT_WORK = """
import json, os
def attempt(action):
    try:
        return action()
    except OSError as error:
        return error.strerror
def write(path):
    with open(path, "a") as file:
        file.write("more")
    return "written"
print(json.dumps({
    "ours": attempt(lambda: write("/out/ours")),
    "theirs": attempt(lambda: open("/out/theirs").read()),
    "new": attempt(lambda: write("/out/new")),
    "below": attempt(lambda: write("/out/below/new")),
    "everybody's": attempt(lambda: write("/out/everybody/new")),
    "the group's": attempt(lambda: write("/out/group/new")),
    "somebody's": attempt(lambda: write("/out/somebody/new")),
    "directory": attempt(lambda: os.mkdir("/out/directory")),
    "gives": attempt(lambda: os.chown("/out/ours", 0, 0)),
    "owners": [os.stat("/out/ours").st_uid, os.stat("/out/new").st_uid, os.stat("/out/theirs").st_uid],
    "in": attempt(lambda: write("/in/everybody")),
}))
"""


@pytest.fixture
def volume() -> Iterator[Path]:
    """Of the task's user, with files of several owners, and another file system below it."""
    place = Path(tempfile.mkdtemp(prefix="ai-volume-", dir="/var/tmp"))
    os.chown(place, OURS, SOMEBODY)
    (place / "ours").write_text("some ")
    os.chown(place / "ours", OURS, SOMEBODY)
    (place / "theirs").write_text("root's")
    (place / "theirs").chmod(0o600)
    for name, owner, group, mode in (
        ("everybody", 0, SOMEBODY, 0o777),
        ("group", SOMEBODY, 0, 0o770),
        ("somebody", SOMEBODY, SOMEBODY, 0o755),
    ):
        (place / name).mkdir()
        os.chown(place / name, owner, group)
        (place / name).chmod(mode)
    below = place / "below"
    below.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"uid={OURS},mode=700", "none", str(below)], check=True)
    yield place
    subprocess.run(["umount", str(below)], check=True)
    shutil.rmtree(place)


@pytest.fixture
def read_only() -> Iterator[Path]:
    """Files of the task's user, which the task may only read; and one that everybody may write to."""
    place = Path(tempfile.mkdtemp(prefix="ai-read-only-", dir="/var/tmp"))
    place.chmod(0o755)
    for name, mode in (("file", 0o644), ("everybody", 0o666)):
        (place / name).write_text("as it was")
        (place / name).chmod(mode)
        os.chown(place / name, OURS, 0)
    yield place
    shutil.rmtree(place)


def test_a_task_has_its_own_files_as_without_a_namespace(worker: Worker, volume: Path, read_only: Path) -> None:
    volumes = [Mount(source=str(volume), target="/out", read_only=False), Mount(source=str(read_only), target="/in")]
    task = worker.task(volumes=volumes)
    assert task.launch.spec.user_namespace
    running = worker.start(task, AT_WORK)
    assert (running.start_mode, running.why_fresh) == ("fork", "")
    assert running.json() == {
        "ours": "written",
        "theirs": "Permission denied",
        "new": "written",
        "below": "written",
        "everybody's": "written",
        "the group's": "written",
        "somebody's": "Permission denied",
        "directory": None,
        "gives": "Value too large for defined data type",  # there is no root of the files in there
        "owners": [OURS, OURS, 65534],
        "in": "Read-only file system",
    }
    assert (volume / "ours").read_text() == "some more"
    made = [volume / name for name in ("ours", "new", "directory", "below/new", "group/new")]
    assert {(path.stat().st_uid, path.stat().st_gid) for path in made[1:]} == {(OURS, 0)}
    assert (made[0].stat().st_uid, made[0].stat().st_gid) == (OURS, SOMEBODY)
    (volume / "directory").rmdir()
    fresh = worker.start(worker.task(volumes=volumes, cfg="start_mode = fresh"), AT_WORK)
    assert fresh.start_mode == "fresh"
    differences = {name for name, said in fresh.json().items() if said != running.json()[name]}
    assert differences == {"owners", "gives"}


def test_a_hostile_zygote_is_nobody_but_the_user_there(worker: Worker, volume: Path, read_only: Path) -> None:
    volume.chmod(0o777)
    task = worker.task(
        "hostile",
        environment={"AIRFLOW_TEST_CHEAT": "writes_in_there"},
        volumes=[
            Mount(source=str(volume), target="/out", read_only=False),
            Mount(source=str(read_only), target="/in"),
        ],
    )
    assert worker.start(task).finish() == 0
    (volume / "by-50000-0").unlink()  # from the attempt in which it was to be forked
    assert task.plan
    beside = workloads._beside(task.launch, worker.zygote(task), task.plan)
    victims = replace(beside, id=new_container_id("task"), zygote="")
    victim = worker.start(Task(victims, None), "print('up', flush=True); requests.recv(1)")
    victim.until(lambda: "up" in victim.stdout)
    done = fork_by_hand(worker, task, victim.workload.container.pid)["done"]
    # Its seccomp filter lets it mount nothing anew: what is read-only stays so.
    assert done == ["makes one as 50000:0"]
    assert [path.name for path in volume.glob("by-*")] == ["by-50000-0"]
    assert (volume / "by-50000-0").stat().st_uid == OURS
    assert (volume / "theirs").stat().st_uid == 0
    assert (read_only / "file").read_text() == "as it was"
    victim.workload.channels.requests.send(b"x")
    assert victim.finish() == 0


def test_a_runtime_that_knows_nothing_of_it_gets_no_task_into_the_namespace(worker: Worker, volume: Path) -> None:
    """The worker has asked another runc than the one that the daemon uses."""
    task = worker.task(volumes=[Mount(source=str(volume), target="/out", read_only=False)])
    assert task.launch.spec.user_namespace
    socket_path = worker.runtime.info().socket_path
    with connect("containerd", socket_path=socket_path, namespace=NAMESPACE, state_dir=worker.state_dir) as daemons_own:
        running = Running(launch(daemons_own, task.launch, state_dir=worker.state_dir, plan=task.plan))
        worker.started.append(running)
        running.send("open('/out/new', 'w').close()")
        # containerd 2 asks the runtime itself; older ones don't, and then we see what is mounted.
        assert "idmap mounts not supported" in running.why_fresh or "did not map the ids" in running.why_fresh
        assert (running.start_mode, running.finish(), running.stderr) == ("fresh", 0, "")
        assert (volume / "new").stat().st_uid == OURS
        worker.end()
    # Neither of the attempt that was refused, nor of the one that ran.
    assert not [shim for shim in shims() if running.workload.container.id in shim]


def shims() -> list[str]:
    return [
        " ".join(process.info["cmdline"] or ())
        for process in psutil.process_iter(["cmdline"])
        if "containerd-shim" in " ".join(process.info["cmdline"] or ())
    ]
