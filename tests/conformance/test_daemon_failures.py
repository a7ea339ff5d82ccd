"""The daemon is away, restarts, hangs, or is not a daemon at all."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.conftest import freeze

from airflow_isolation.errors import ContainerNotFound, ContainerRuntimeError, RuntimeUnreachable
from airflow_isolation.runtime.connect import connect
from airflow_isolation.runtime.interface import ContainerState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conformance.conftest import Host

    from airflow_isolation.runtime.interface import ContainerRuntime

# The docker SDK forgets a socket whose connect failed, until Python collects it.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

KINDS = ("docker", "containerd")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextmanager
def runtime_at(kind: str, socket_path: Path, state_dir: Path) -> Iterator[ContainerRuntime]:
    with connect(kind, socket_path=str(socket_path), namespace="airflow", state_dir=state_dir, timeout=2.0) as runtime:
        yield runtime


def test_no_socket_is_said_with_its_path_and_what_to_do(kind: str, state_dir: Path) -> None:
    with runtime_at(kind, state_dir / "absent.sock", state_dir) as runtime:
        with pytest.raises(RuntimeUnreachable, match=r"there is no socket .*absent\.sock") as caught:
            runtime.info()
        assert "socket_path" in caught.value.hint
        for ask in (runtime.get, runtime.start, runtime.wait, runtime.kill, runtime.remove, runtime.output):
            with pytest.raises(RuntimeUnreachable):
                ask("a")
        with pytest.raises(RuntimeUnreachable):
            runtime.ensure_image("localhost/a:1")
        with pytest.raises(RuntimeUnreachable):
            runtime.list()


def test_a_file_is_not_a_socket(kind: str, state_dir: Path) -> None:
    place = state_dir / "file"
    place.write_text("")
    with runtime_at(kind, place, state_dir) as runtime, pytest.raises(RuntimeUnreachable, match="is not a socket"):
        runtime.info()
    place.unlink()


def test_a_socket_at_which_nobody_listens(kind: str, state_dir: Path) -> None:
    place = state_dir / "dead.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(place))
    with runtime_at(kind, place, state_dir) as runtime, pytest.raises(RuntimeUnreachable, match="nothing listens"):
        runtime.info()
    place.unlink()


def test_a_listener_that_never_answers_does_not_hold_us(kind: str, state_dir: Path) -> None:
    place = state_dir / "silent.sock"
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(place))
        silent.listen(8)
        with runtime_at(kind, place, state_dir) as runtime, pytest.raises(RuntimeUnreachable, match=r"silent\.sock"):
            runtime.info()
    place.unlink()


# What is imported is imported as root: the interpreter may lie where nobody else may enter.
AS_NOBODY = """
import os, sys
from pathlib import Path
from airflow_isolation.errors import RuntimeUnreachable
from airflow_isolation.runtime.connect import connect
backend, socket_path, state_dir = sys.argv[1:]
with connect(backend, socket_path=socket_path, state_dir=Path(state_dir)) as runtime:
    runtime.info()
    runtime.close()
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    try:
        runtime.info()
    except RuntimeUnreachable as error:
        print(error)
"""


def test_who_may_not_use_the_socket_is_told_of_the_group(host: Host) -> None:
    said = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, host.backend.partition("-")[0], str(host.daemon.socket), str(host.state_dir)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "may not use the socket" in said.stdout, said
    assert "group" in said.stdout


@pytest.mark.parametrize("name", ["TERM", "KILL"])
def test_a_container_outlives_a_restart_and_the_wait_is_taken_up_again(fragile_host: Host, name: str) -> None:
    host = fragile_host
    id = host.create("bash", "-c", "while [ ! -e /data/end ]; do sleep 0.05; done; exit 6", **_data(host))
    with host.runtime.wait(id) as pending:
        host.runtime.start(id)
        host.daemon.restart(signal=name)
        assert host.runtime.get(id).state is ContainerState.RUNNING
        with pytest.raises(TimeoutError):
            pending.result(0)
        (host.state_dir / "end").touch()
        assert select.select([pending], [], [], 30)[0]
        assert pending.result(0).code == 6
    (host.state_dir / "end").unlink()


def _data(host: Host) -> dict[str, Any]:
    from airflow_isolation.container_spec import Mount

    return {"mounts": (Mount(source=str(host.state_dir), target="/data"),)}


def test_a_container_may_end_while_the_daemon_is_away(fragile_host: Host) -> None:
    host = fragile_host
    id = host.start("sleep", "600")
    pid = host.runtime.get(id).pid
    with host.runtime.wait(id) as pending:
        os.kill(host.daemon.pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(RuntimeUnreachable):
            host.runtime.get(id)
        host.daemon.start()
        # Who was away may not know the status any more, but never claims success.
        assert pending.result(60).code in (137, 255)
    host.runtime.remove(id)


def test_a_container_may_be_removed_after_a_restart(fragile_host: Host) -> None:
    host = fragile_host
    ids = [host.start("sleep", "600"), host.create("sleep", "600")]
    host.daemon.restart(signal="KILL")
    for id in ids:
        host.runtime.remove(id)
        with pytest.raises(ContainerNotFound):
            host.runtime.get(id)


def test_a_new_container_starts_after_a_restart(fragile_host: Host) -> None:
    fragile_host.runtime.info()
    fragile_host.daemon.restart()
    assert fragile_host.run("true")[0].code == 0


def test_a_wait_is_closed_promptly_while_the_daemon_is_away(fragile_host: Host) -> None:
    host = fragile_host
    id = host.start("sleep", "600")
    pending = host.runtime.wait(id)
    os.kill(host.daemon.pid, signal.SIGKILL)
    time.sleep(1)
    pending.close()
    host.daemon.start()


def test_a_hanging_daemon_holds_nobody(fragile_host: Host) -> None:
    host = fragile_host
    id = host.start("sleep", "600")
    impatient = host.connect(timeout=2.0)
    pending = impatient.wait(id)
    daemon = host.daemon.pid
    freeze(daemon)
    try:
        for ask in (impatient.get, impatient.output, impatient.start):
            with pytest.raises(RuntimeUnreachable, match=str(host.daemon.socket)):
                ask(id)
        with pytest.raises(RuntimeUnreachable):
            impatient.kill(id)
        with pytest.raises(RuntimeUnreachable):
            impatient.list()
        with pytest.raises(RuntimeUnreachable):
            impatient.create("test-hanging", host.spec())
        pending.close()
    finally:
        os.kill(daemon, signal.SIGCONT)
    impatient.close()
    # What the daemon did of it after all is removed as any other.
    host.runtime.remove("test-hanging")
    # The kill that got no answer may have been done.
    assert host.runtime.get(id).state in (ContainerState.RUNNING, ContainerState.STOPPED)


def test_a_shim_that_dies_ends_the_wait_and_leaves_nothing(fragile_host: Host) -> None:
    host = fragile_host
    id = host.start("sleep", "600")
    shim = int(_parent_of(host.runtime.get(id).pid))
    with host.runtime.wait(id) as pending:
        os.kill(shim, signal.SIGKILL)
        assert pending.result(60).code in (137, 255)
    host.runtime.remove(id)


def _parent_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]


def test_without_the_docker_sdk_its_extra_is_named(monkeypatch: pytest.MonkeyPatch, state_dir: Path) -> None:
    from airflow_isolation.runtime import docker

    docker._sdk.cache_clear()
    monkeypatch.setitem(sys.modules, "docker", None)
    with pytest.raises(ContainerRuntimeError, match=r"airflow-isolation\[docker\]"):
        connect("docker", state_dir=state_dir)
    docker._sdk.cache_clear()
