"""What is on the host of containers that the daemon has no record of is found and removed; nobody else is hit."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.conformance.conftest import NAMESPACE
from tests.processes import wait_until

from airflow_isolation.cgroups import names_below
from airflow_isolation.containerd.api import containers_pb2
from airflow_isolation.containerd.client import Client
from airflow_isolation.errors import IsolationError
from airflow_isolation.oci import new_container_id
from airflow_isolation.runtime import labels
from airflow_isolation.runtime.files import files_of_daemon
from airflow_isolation.runtime.interface import Container, ContainerState, Stray

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conformance.conftest import Host

CGROUPS = Path("/sys/fs/cgroup")
SECONDS = 30
on_containerd = pytest.mark.parametrize("backend", ["containerd-2.1"])

#: As far as runc is when its process waits in the cgroups of a container and it has not written down that there is one.
HALF_A_RUNC = """\
#!/bin/sh
for word; do
    [ "$word" != create ] || create=yes
    id=$word
done
[ "$create" ] || exec runc "$@"
setsid sleep 600 <&- >&- 2>&- &
for hierarchy in /sys/fs/cgroup/*/; do
    [ ! -e $hierarchy/cgroup.procs ] || mkdir -p $hierarchy/{parent}/$id
    [ $hierarchy = /sys/fs/cgroup/cpuset/ ] || echo $! >$hierarchy/{parent}/$id/cgroup.procs
done
echo $! >{place}/created
exec sleep 600
"""


def hierarchies() -> list[Path]:
    return [place for place in CGROUPS.iterdir() if (place / "cgroup.procs").exists() and not place.is_symlink()]


@contextmanager
def left_cgroups(name: str, *, parent: str = NAMESPACE) -> Iterator[subprocess.Popen[bytes]]:
    """As a runtime that was killed leaves them, with a process and a cgroup in each."""
    places = [hierarchy / parent / name for hierarchy in hierarchies()]
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            for place in places:
                (place / "within").mkdir(parents=True)
                if place.parts[4] != "cpuset":  # which wants to be told its processors first
                    (place / "within/cgroup.procs").write_text(str(process.pid))
            yield process
        finally:
            process.kill()
            process.wait()
            for place in places:
                for each in (place / "within", place):
                    with suppress(FileNotFoundError):
                        wait_until(lambda each=each: not (each / "cgroup.procs").read_text(), SECONDS, "its end")  # type: ignore[misc]
                        each.rmdir()


@on_containerd
@pytest.mark.parametrize("frozen", [False, True])
def test_cgroups_without_a_container_go_with_all_that_is_in_them(host: Host, frozen: bool) -> None:
    id, own = new_container_id("task"), host.start()
    with left_cgroups(id) as process, left_cgroups("somebody-elses") as other:
        if frozen:
            (CGROUPS / "freezer" / NAMESPACE / id / "within/freezer.state").write_text("FROZEN")
        assert host.runtime.seen_on_host() == {id, own}
        assert host.runtime.remove_strays(dry_run=True) == (Stray(kind="cgroup", id=id),)
        assert process.poll() is None
        assert host.runtime.remove_strays() == (Stray(kind="cgroup", id=id),)
        assert process.wait(SECONDS) == -signal.SIGKILL
        assert not [place for place in hierarchies() if (place / NAMESPACE / id).exists()]
        assert other.poll() is None
    assert host.runtime.remove_strays() == ()
    assert host.runtime.get(own).state is ContainerState.RUNNING


@on_containerd
def test_they_are_found_below_every_parent_that_a_worker_has_used(host: Host) -> None:
    parent = f"{NAMESPACE}/below"
    host.runtime.remove(host.create(cgroup_parent=parent))
    id = new_container_id("task")
    with left_cgroups(id, parent=parent) as process, host.connect() as another:
        assert another.remove_strays() == (Stray(kind="cgroup", id=id),)
        assert process.wait(SECONDS) == -signal.SIGKILL
    (host.state_dir / "cgroup-parents" / parent.replace("/", "%2F")).unlink()
    for place in hierarchies():
        with suppress(FileNotFoundError):
            (place / parent).rmdir()


@on_containerd
def test_a_container_of_another_namespace_is_not_ours_although_it_is_in_the_same_cgroup(host: Host) -> None:
    own = host.start()
    (host.state_dir / "elsewhere").mkdir()
    with host.connect(namespace=f"{NAMESPACE}-other", state_dir=host.state_dir / "elsewhere") as other:
        # Not its containers: those are in the first one.
        Path(host.state_dir, "elsewhere/cgroup-parents").mkdir()
        Path(host.state_dir, f"elsewhere/cgroup-parents/{NAMESPACE}").touch()
        os.utime(files_of(host, own), (0, 0))
        assert other.seen_on_host() == {own}
        assert other.remove_strays() == ()
    for path in sorted(host.state_dir.joinpath("elsewhere").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    host.state_dir.joinpath("elsewhere").rmdir()
    assert host.runtime.get(own).state is ContainerState.RUNNING


def files_of(host: Host, id: str) -> Path:
    return files_of_daemon(host.state_dir, "containerd", str(host.daemon.socket), NAMESPACE) / id


@on_containerd
def test_the_files_of_other_daemons_containers_are_theirs(host: Host) -> None:
    """All of a host may have one state directory."""
    others = [
        files_of_daemon(host.state_dir, *daemon) / new_container_id("task")
        for daemon in (
            ("docker", "/run/docker.sock", NAMESPACE),
            ("containerd", str(host.daemon.socket), f"{NAMESPACE}-other"),
        )
    ]
    for files in others:
        files.mkdir(parents=True)
        os.utime(files, (0, 0))
    assert host.runtime.remove_strays() == ()
    for files in others:
        files.rmdir()


def forget(host: Host, id: str) -> Container:
    """The container goes on, without its record."""
    container = host.runtime.get(id)
    with Client(host.daemon.socket, namespace=NAMESPACE) as client:
        client.containers.Delete(containers_pb2.DeleteContainerRequest(id=id))
    return container


@on_containerd
def test_a_shim_without_a_record_goes_with_its_container(host: Host) -> None:
    id = host.start()
    container = forget(host, id)
    os.utime(files_of(host, id), (0, 0))
    everything = {"shim", "cgroup", "directory"}
    assert {stray.kind for stray in host.runtime.remove_strays(dry_run=True)} == everything
    assert Path(f"/proc/{container.pid}").exists()
    assert {stray.kind for stray in host.runtime.remove_strays()} == everything
    assert not Path(f"/proc/{container.pid}").exists()
    assert not files_of(host, id).exists()
    assert host.runtime.remove_strays() == ()


@pytest.fixture
def half_a_runc(fragile_host: Host) -> Iterator[str]:
    """A runtime that gets no further than half of ``create``; it writes to the file ``created`` who then waits for it."""
    place = fragile_host.state_dir
    program = place / "half-a-runc"
    program.write_text(HALF_A_RUNC.format(place=place, parent=NAMESPACE))
    program.chmod(0o755)
    yield str(program)
    for name in ("half-a-runc", "created"):
        (place / name).unlink()


@on_containerd
@pytest.mark.parametrize("worker", ["lives", "dies"])
def test_nothing_stays_of_what_was_made_when_the_daemon_was_killed(
    fragile_host: Host, half_a_runc: str, worker: str
) -> None:
    host = fragile_host
    id = new_container_id("test")
    failed = threading.Event()
    created = host.state_dir / "created"
    with host.connect(runtime_binary=half_a_runc) as runtime:

        def create() -> None:
            try:
                runtime.create(id, host.spec())
            except IsolationError:
                failed.set()

        creating = threading.Thread(target=create)
        if worker == "dies":
            # Nothing of it is undone.
            runtime._undo = lambda record: None  # type: ignore[attr-defined]
        creating.start()
        wait_until(lambda: created.exists() and bool(created.read_text()), SECONDS, "the runtime to be called")
        waiting = int(created.read_text())
        os.kill(host.daemon.pid, signal.SIGKILL)
        host.daemon.start()
        creating.join(2 * SECONDS)
        assert failed.is_set()
    assert (id in names_below(NAMESPACE)) is (worker == "dies")
    if worker == "dies":
        forget(host, id)
        assert host.runtime.seen_on_host() == {id}
        host.runtime.remove_strays()
        # It is too young: who looks again finds it.
        assert host.runtime.seen_on_host() == {id}
        files = files_of(host, id)
        os.utime(files, (0, 0))
        assert host.runtime.remove_strays() == (Stray(kind="directory", id=id, detail=str(files)),)
    wait_until(lambda: not Path(f"/proc/{waiting}").exists(), SECONDS, "the end of the runtime's process")
    assert id not in names_below(NAMESPACE)


@on_containerd
def test_a_lease_of_a_dead_worker_goes_and_a_living_ones_stays(host: Host) -> None:
    living = labels.Owner.this_process()
    dead = replace(living, started=living.started + 1)
    with ExitStack() as opened:
        held = []
        for owner in (living, dead):
            client = opened.enter_context(
                Client(host.daemon.socket, namespace=NAMESPACE, lease_labels={labels.OWNER: str(owner)})
            )
            held.append(opened.enter_context(client.lease(expires=timedelta(hours=1))).lease_id)
        assert host.runtime.remove_strays(dry_run=True) == (Stray(kind="lease", id=held[1]),)
        assert host.runtime.remove_strays() == (Stray(kind="lease", id=held[1]),)
        assert host.runtime.remove_strays() == ()
