"""hack/daemon, with real daemons and a real container: what it starts, and that it leaves nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from base64 import b64encode
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.conftest import CONTAINERD_VERSIONS, HACK, Daemon, hack, running

from airflow_isolation.containerd.mapped_layers import mapped_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import ImageArchive, ImageName

BACKENDS = [*(pytest.param(f"containerd {version}", id=version) for version in CONTAINERD_VERSIONS), "docker"]


@pytest.fixture
def daemon(request: pytest.FixtureRequest) -> Iterator[Daemon]:
    kind, _, version = request.param.partition(" ")
    with running(kind, *([f"--version={version}"] if version else [])) as started:
        yield started


def run_container(daemon: Daemon, id: str, image_archive: ImageArchive, image_name: ImageName) -> None:
    """A container whose first process and whose orphaned grandchild both name the id in their command line."""
    archive, image = str(image_archive("no-python")), image_name("no-python")
    script = f"(sleep 1234 && echo {id} &); sleep 1234; echo {id}"
    if daemon.kind == "docker":
        daemon.run("docker", "load", "--input", archive)
        entry = ["--entrypoint", "/bin/sh", image, "-c", script]
        daemon.run("docker", "run", "--detach", "--name", id, "--network", "none", *entry)
    else:
        daemon.run("ctr", "images", "import", archive)
        daemon.run("ctr", "run", "--detach", "--cgroup", f"/ai-{id}/{id}", image, id, "/bin/sh", "-c", script)
    assert eventually(lambda: len(processes(f"echo {id}")) == 2)


def processes(word: str) -> list[str]:
    """Command lines with this word in them, but for our own."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if word in command:
                found.append(command)
    return found


def mounts(directory: Path) -> list[str]:
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f"{directory}/" in line]


def cgroups(*words: str) -> list[str]:
    return [path for path, _, _ in os.walk("/sys/fs/cgroup") if any(word in path for word in words)]


def shim_sockets(directory: Path) -> list[Path]:
    """What the shims of this daemon listen on, as their bundles say."""
    tasks = "io.containerd.runtime.v2.task/*/*"
    bundles = [*directory.glob(f"state/{tasks}"), *directory.glob(f"exec/containerd/daemon/{tasks}")]
    files = [bundle / name for bundle in bundles for name in ("address", "bootstrap.json")]
    text = "".join(file.read_text() for file in files if file.exists())
    return [Path(path) for path in re.findall(r"unix://(/run/containerd/s/[0-9a-f]+)", text)]


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("daemon", BACKENDS, indirect=True)
@pytest.mark.parametrize("killed", [False, True], ids=["daemon stops", "daemon was killed"])
def test_stop_leaves_nothing(
    daemon: Daemon, image_archive: ImageArchive, image_name: ImageName, *, killed: bool
) -> None:
    name = f"left{uuid.uuid4().hex[:12]}"
    run_container(daemon, name, image_archive, image_name)
    sockets = shim_sockets(daemon.directory)
    assert processes(name)
    assert sockets
    assert all(socket.exists() for socket in sockets)
    assert mounts(daemon.directory)
    assert cgroups(name, "airflow-isolation-")

    if killed:
        os.kill(daemon.pid, signal.SIGKILL)
    hack("daemon", "stop", str(daemon.directory))

    assert eventually(lambda: not processes(name) and not processes(f"{daemon.directory}/"))
    assert [socket for socket in sockets if socket.exists()] == []
    assert mounts(daemon.directory) == []
    assert cgroups(name) == []
    assert not Path("/run/containerd/runc/airflow", name).exists()
    assert not daemon.directory.exists()
    hack("daemon", "stop", str(daemon.directory))


@pytest.mark.parametrize("daemon", ["docker"], indirect=True)
def test_stop_removes_the_bridges_of_a_killed_dockerd(daemon: Daemon) -> None:
    network = daemon.run("docker", "network", "create", "mine").stdout.strip()
    bridge = Path("/sys/class/net", f"br-{network[:12]}")
    assert bridge.exists()
    os.kill(daemon.pid, signal.SIGKILL)
    hack("daemon", "stop", str(daemon.directory))
    assert not bridge.exists()


@pytest.mark.parametrize("daemon", BACKENDS, indirect=True)
def test_a_container_outlives_a_killed_daemon_that_starts_again(
    daemon: Daemon, image_archive: ImageArchive, image_name: ImageName
) -> None:
    name = f"lives{uuid.uuid4().hex[:12]}"
    run_container(daemon, name, image_archive, image_name)
    before, pid = processes(f"echo {name}"), daemon.pid

    daemon.restart(signal="KILL")

    assert daemon.pid not in {0, pid}
    assert processes(f"echo {name}") == before
    listed = (
        ("docker", "ps", "--quiet", "--filter", f"name={name}") if daemon.kind == "docker" else ("ctr", "tasks", "ls")
    )
    assert daemon.run(*listed).stdout.strip()


@pytest.mark.parametrize("daemon", ["containerd 2.1"], indirect=True)
def test_start_finds_what_runs(daemon: Daemon) -> None:
    again = json.loads(hack("daemon", "start", "containerd", "--directory", str(daemon.directory)))
    assert (again["pid"], again["version"], again["running"]) == (daemon.pid, "2.1", True)


@pytest.mark.parametrize("daemon", ["containerd 2.1"], indirect=True)
def test_start_refuses_another_version_in_the_same_directory(daemon: Daemon) -> None:
    assert "already belongs to containerd 2.1" in complaint(
        "start", "containerd", "--version=1.7", "--directory", str(daemon.directory)
    )


@pytest.mark.parametrize("daemon", ["containerd 2.1"], indirect=True)
def test_a_daemon_that_does_not_come_up_shows_its_log(daemon: Daemon) -> None:
    os.kill(daemon.pid, signal.SIGKILL)
    assert eventually(lambda: daemon.pid == 0)
    (daemon.directory / "root").rename(daemon.directory / "elsewhere")
    (daemon.directory / "root").touch()
    said = complaint("start", "containerd", "--directory", str(daemon.directory))
    assert "ended with 1" in said
    assert "not a directory" in said


@pytest.mark.parametrize("asked_for", ["registry", "registry --password"])
def test_registry_asks_for_a_password_only_when_told(asked_for: str) -> None:
    with running(*asked_for.split()) as registry:
        assert status_of(registry, "") == (401 if registry.password else 200)
        assert status_of(registry, f"{registry.user}:{registry.password}") == 200
        if registry.password:
            assert status_of(registry, f"{registry.user}:wrong") == 401


def status_of(registry: Daemon, credentials: str) -> int:
    request = urllib.request.Request(f"http://{registry.address}/v2/")
    if credentials:
        request.add_header("Authorization", f"Basic {b64encode(credentials.encode()).decode()}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code


@pytest.mark.parametrize("daemon", ["containerd 2.1"], indirect=True)
def test_stop_takes_away_what_shows_its_layers_to_user_namespaces(daemon: Daemon, image_archive: ImageArchive) -> None:
    daemon.run("ctr", "images", "import", str(image_archive("no-python")))
    layers = [str(path) for path in daemon.directory.glob("root/*/snapshots/*/fs")]
    assert layers
    with tempfile.TemporaryDirectory(prefix="ai-layers-", dir="/var/tmp") as place:
        end = time.monotonic() + 60
        with mapped_layers(Path(place, "roots"), layers, first=700000, size=65536, pid=os.getpid(), end=end) as shown:
            assert all(path in Path("/proc/self/mountinfo").read_text() for path in shown)
        hack("daemon", "stop", str(daemon.directory))
        assert place not in Path("/proc/self/mountinfo").read_text()


def test_a_directory_too_long_for_sockets_is_refused(tmp_path: Path) -> None:
    assert "at most 60 bytes" in complaint("start", "containerd", "--directory", str(tmp_path / ("x" * 60)))


def test_stop_leaves_a_directory_alone_that_is_not_a_daemons(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    assert "left alone" in complaint("stop", str(tmp_path))
    assert (tmp_path / "mine").exists()


def test_start_leaves_a_directory_alone_that_is_not_empty() -> None:
    with running("registry") as registry:
        directory = registry.directory.parent / "other"
        directory.mkdir()
        (directory / "mine").touch()
        assert "not empty" in complaint("start", "registry", "--directory", str(directory))
        (directory / "mine").unlink()
        directory.rmdir()


def complaint(*arguments: str) -> str:
    """What hack/daemon says when it refuses."""
    done = subprocess.run(
        [sys.executable, str(HACK / "daemon"), *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    return done.stderr
