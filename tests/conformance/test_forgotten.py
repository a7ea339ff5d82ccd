"""What a killed dockerd has forgotten of a container is found by its id and removed; nobody else's is hit."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.conformance.conftest import IMAGE, NAMESPACE

from airflow_isolation.bridge.prune import prune, prune_when_due
from airflow_isolation.cgroups import places_of
from airflow_isolation.errors import IsolationError
from airflow_isolation.oci import new_container_id
from airflow_isolation.runtime import labels
from airflow_isolation.runtime.docker import DockerRuntime
from airflow_isolation.runtime.docker_ids import DockerIds
from airflow_isolation.runtime.files import files_of_daemon
from airflow_isolation.runtime.interface import ContainerState, Stray
from airflow_isolation.runtime.shims import Shim, shims

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conformance.conftest import Host

SECONDS = 30
#: Half of the kills come early enough, and late enough.
KILLS = 30

pytestmark = [
    pytest.mark.parametrize("backend", ["docker"]),
    # The docker SDK leaves the socket of a connection that was refused to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]


@dataclass(frozen=True)
class Forgotten:
    """A container whose record says that it was created, and whose shim runs."""

    id: str
    docker_id: str
    shim: Shim

    def left(self, host: Host) -> list[str]:
        """What of it is on the host, but for the directories of ours."""
        containerd = ("--address", self.shim.address, "--namespace", "moby", "containers", "list", "--quiet")
        records = host.daemon.run("ctr", *containerd).stdout.split()
        return [
            *(f"shim {shim.pid}" for shim in shims() if shim.id == self.docker_id),
            *(f"cgroup {name} in {parent}" for parent, name in places_of([self.docker_id])),
            *(str(path) for path in host.daemon.directory.rglob(self.docker_id)),
            *(f"record {record}" for record in records if record == self.docker_id),
        ]


def files_of(host: Host) -> Path:
    return files_of_daemon(host.state_dir, "docker", str(host.daemon.socket), NAMESPACE)


def docker_id_of(host: Host, id: str) -> str:
    return host.daemon.run("docker", "inspect", "--format", "{{.Id}}", id).stdout.strip()


def shim_of(docker_id: str) -> Shim | None:
    return next((shim for shim in shims() if shim.id == docker_id), None)


def forgotten(host: Host, **changes: object) -> Forgotten:
    """Kill dockerd as soon as a starting container has its shim, until that has happened in time."""
    for _ in range(KILLS):
        id = host.create(id=new_container_id("task"), cgroup_parent=f"{NAMESPACE}-forgotten", **changes)
        docker_id, dockerd = docker_id_of(host, id), host.daemon.pid

        def start(id: str = id) -> None:
            with suppress(IsolationError):
                host.runtime.start(id)

        starting = threading.Thread(target=start)
        starting.start()
        while starting.is_alive() and shim_of(docker_id) is None:
            pass
        os.kill(dockerd, signal.SIGKILL)
        starting.join(SECONDS)
        host.daemon.start()
        shim = shim_of(docker_id)
        if shim is not None and host.runtime.get(id).state is ContainerState.CREATED:
            return Forgotten(id, docker_id, shim)
        host.runtime.remove(id)
    raise AssertionError(f"dockerd forgot none of {KILLS} containers")


@pytest.fixture
def host(fragile_host: Host) -> Iterator[Host]:
    yield fragile_host
    # What tells when somebody has looked.
    for name in ("looked", "pruned"):
        (fragile_host.state_dir / name).unlink(missing_ok=True)
    for parent in Path("/sys/fs/cgroup").glob(f"*/{NAMESPACE}-forgotten"):
        parent.rmdir()


@pytest.fixture
def no_records(caplog: pytest.LogCaptureFixture) -> None:
    """A warning that is kept keeps its error, and that the socket."""
    caplog.set_level(logging.ERROR, "airflow_isolation.runtime.docker")


@pytest.fixture
def somebody_elses(host: Host) -> Iterator[str]:
    """A container of another user's of this dockerd, in a cgroup below the same parent; its shim."""
    parent = f"/{NAMESPACE}-forgotten"
    run = (
        "docker",
        "run",
        "--detach",
        "--network=none",
        f"--cgroup-parent={parent}",
        "--entrypoint=sleep",
        IMAGE,
        "600",
    )
    docker_id = host.daemon.run(*run).stdout.strip()
    yield docker_id
    running = host.daemon.run("docker", "inspect", "--format", "{{.State.Running}}", docker_id).stdout.strip()
    alive = shim_of(docker_id)
    host.daemon.run("docker", "rm", "--force", docker_id)
    assert (running, alive is not None) == ("true", True)


def test_a_worker_removes_all_of_its_container_that_dockerd_has_forgotten(host: Host, somebody_elses: str) -> None:
    found = forgotten(host)
    assert found.left(host)
    host.runtime.remove(found.id)
    assert found.left(host) == []
    assert not (files_of(host) / found.id).exists()


@pytest.mark.parametrize("who", ["another worker", "prune"])
def test_so_does_whoever_comes_when_the_record_is_gone(host: Host, somebody_elses: str, who: str) -> None:
    found = forgotten(host)
    host.daemon.run("docker", "rm", "--force", found.id)
    before = found.left(host)
    assert f"shim {found.shim.pid}" in before
    # So that the daemon's directory is more than what can be deleted.
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", found.shim.bundle.readlink() / "rootfs"], check=True)
    with host.connect() as another:
        assert another.seen_on_host() == {found.id}
        told = prune(another, state_dir=host.state_dir, dry_run=True).strays
        assert Stray(kind="shim", id=found.id, detail=f"process {found.shim.pid}") in told
        assert set(before) <= set(found.left(host))
        if who == "prune":
            assert prune(another, state_dir=host.state_dir).strays == told
        else:
            (host.state_dir / "pruned").touch()  # it is not due: something looks left over
            prune_when_due(another, state_dir=host.state_dir)
        assert found.left(host) == []
        assert another.seen_on_host() == frozenset()
        assert another.remove_strays() == ()


def test_prune_removes_a_dead_workers_container_and_what_dockerd_has_forgotten_of_it(host: Host) -> None:
    living = labels.Owner.this_process()
    found = forgotten(host, labels={labels.OWNER: str(replace(living, started=living.started + 1))})
    pruned = prune(host.runtime, state_dir=host.state_dir)
    assert [container.id for container in pruned.containers] == [found.id]
    assert found.left(host) == []
    assert not (files_of(host) / found.id).exists()


def test_what_was_never_noted_here_is_not_ours(host: Host, somebody_elses: str) -> None:
    """Another installation with the same daemon, namespace and cgroups, and a place of its own for its notes."""
    found = forgotten(host)
    host.daemon.run("docker", "rm", "--force", found.id)
    before = found.left(host)
    elsewhere = host.state_dir / "elsewhere"
    with host.connect(state_dir=elsewhere) as other, host.connect(namespace=f"{NAMESPACE}-other") as another:
        assert other.remove_strays() == another.remove_strays() == ()
    assert found.left(host) == before
    assert {stray.kind for stray in host.runtime.remove_strays()} >= {"shim"}
    assert found.left(host) == []


def test_a_container_that_dockerd_knows_is_left_alone_whatever_its_name_is(host: Host) -> None:
    id = host.start()
    host.daemon.run("docker", "rename", id, "another-name")
    assert host.runtime.remove_strays() == ()
    host.daemon.run("docker", "rename", "another-name", id)
    assert host.runtime.get(id).state is ContainerState.RUNNING


def test_a_directory_without_a_note_and_a_record_goes(host: Host) -> None:
    id = host.create()
    left = files_of(host) / new_container_id("task")
    left.mkdir()
    assert host.runtime.remove_strays(dry_run=True) == (Stray(kind="directory", id=left.name, detail=str(left)),)
    assert host.runtime.remove_strays() == (Stray(kind="directory", id=left.name, detail=str(left)),)
    assert not left.exists()
    assert DockerIds(files_of(host)).read() == {id: docker_id_of(host, id)}


@pytest.mark.usefixtures("no_records")
def test_a_container_in_which_an_image_was_read_goes_although_dockerd_was_away_and_its_worker_lives(host: Host) -> None:
    assert isinstance(host.runtime, DockerRuntime)
    image = host.daemon.run("docker", "inspect", "--format", "{{.Id}}", IMAGE).stdout.strip()
    with host.runtime._never_started(image, "look at it") as name:
        os.kill(host.daemon.pid, signal.SIGKILL)
    host.daemon.start()
    assert [container.id for container in host.runtime.list()] == [name]
    with host.connect() as another:
        assert another.seen_on_host() == {name}
        assert another.remove_strays(dry_run=True) == another.remove_strays() == (Stray(kind="container", id=name),)
        assert another.seen_on_host() == frozenset()
        assert another.list() == ()


@pytest.mark.usefixtures("no_records")
def test_what_was_being_made_when_dockerd_was_killed_goes_although_its_worker_lives(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        os.kill(host.daemon.pid, signal.SIGKILL)
        raise OSError(0, "dockerd was killed after it had made the container")

    id = new_container_id("task")
    with monkeypatch.context() as patched:
        patched.setattr("airflow_isolation.runtime.docker.write_etc_files", killed)
        with pytest.raises(OSError, match="dockerd was killed"):
            host.runtime.create(id, host.spec())
    host.daemon.start()
    assert host.runtime.get(id).state is ContainerState.CREATED
    with host.connect() as another:
        assert another.seen_on_host() == {id}
        assert another.remove_strays(dry_run=True) == another.remove_strays() == (Stray(kind="container", id=id),)
        assert another.seen_on_host() == frozenset()
        assert another.list() == ()
