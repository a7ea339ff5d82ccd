"""One suite, every backend: each test runs on dockerd and on each release of containerd, all real and private.

After every test it is checked, not assumed, that nothing of ours is left: in the daemon, on the host, in this process.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.conformance.archives import derived

from airflow_isolation.container_spec import ContainerSpec
from airflow_isolation.oci import new_container_id
from airflow_isolation.runtime.connect import connect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Daemon, ImageArchive, StartDaemon

    from airflow_isolation.runtime.interface import ContainerRuntime, ExitStatus

BACKENDS = ("docker", "containerd-1.6", "containerd-1.7", "containerd-2.1")
OLDER_RELEASES = ("containerd-1.6", "containerd-1.7")
# One of this session's own: containers of another session on this host are not in it, nor their cgroups below its name.
NAMESPACE = f"conformance-{os.getpid()}"
SETTLE_SECONDS = 15
IMAGE = "localhost/airflow-isolation/conformance:1"
# Docker makes it with the first container on the host's network, and keeps it for those that follow.
DOCKER_HOST_NETWORK = "/netns/default"
PROBE = Path(__file__).parent.parent / "probe" / "probe.py"

PASSWD = """\
root:x:0:0:root:/root:/bin/bash
airflow:x:50000:0:Airflow:/home/airflow:/bin/bash
worker:x:1000:1000:Worker:/home/worker:/bin/bash
second-root:x:0:0:Root by another name:/root:/bin/bash
"""
GROUP = "root:x:0:\nworker:x:1000:\nextra:x:2000:worker,airflow\n"


@dataclass
class Host:
    """A daemon, a runtime on it, and what the tests of both backends do in the same way."""

    backend: str
    daemon: Daemon
    state_dir: Path
    runtime: ContainerRuntime
    made: list[str] = field(default_factory=list)

    def connect(self, **settings: Any) -> ContainerRuntime:
        """One more runtime on the same daemon; the test closes it."""
        given = {
            "socket_path": str(self.daemon.socket),
            "namespace": NAMESPACE,
            "state_dir": self.state_dir,
            **settings,
        }
        return connect(self.backend.partition("-")[0], **given)

    def spec(self, *argv: str, **changes: Any) -> ContainerSpec:
        return ContainerSpec(argv=argv or ("sleep", "600"), **{"image": IMAGE, "network": "none", **changes})

    def create(self, *argv: str, id: str = "", **changes: Any) -> str:
        """Make a container that the fixture removes; give its id."""
        id = id or new_container_id("test")
        self.runtime.create(id, self.spec(*argv, **changes))
        self.made.append(id)
        return id

    def start(self, *argv: str, **changes: Any) -> str:
        id = self.create(*argv, **changes)
        self.runtime.start(id)
        return id

    def run(self, *argv: str, **changes: Any) -> tuple[ExitStatus, str]:
        """Run to the end; the exit status and the output."""
        id = self.create(*argv, **changes)
        with self.runtime.wait(id) as pending:
            self.runtime.start(id)
            status = pending.result(60)
        return status, self.runtime.output(id).decode()

    def python(self, program: str, **changes: Any) -> Any:
        """What ``program`` says in JSON."""
        status, output = self.run("python3", "-c", program, **changes)
        assert status.code == 0, output
        return json.loads(output)


@pytest.fixture(scope="session")
def conformance_archive(image_archive: ImageArchive, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return derived(
        image_archive("no-airflow"),
        tmp_path_factory.mktemp("archive") / "conformance.tar",
        name=IMAGE,
        config={
            "User": "airflow",
            "Env": ["PATH=/usr/local/bin:/usr/bin:/bin", "COLOUR=of-the-image", "SHAPE=of-the-image"],
            "WorkingDir": "/srv",
            "Entrypoint": ["/bin/false"],
            "Cmd": ["of-the-image"],
        },
        files={
            "etc/passwd": PASSWD.encode(),
            "etc/group": GROUP.encode(),
            "usr/local/bin/not-a-program": b"\x00\x01\x02\x03",
        },
    )


@pytest.fixture(scope="session")
def daemon_of(
    containerd_of_version: Callable[[str], Daemon], request: pytest.FixtureRequest, conformance_archive: Path
) -> Callable[[str], Daemon]:
    """The session's daemon of a backend, with the suite's image in it."""
    ready: dict[str, Daemon] = {}

    def daemon(backend: str) -> Daemon:
        if backend not in ready:
            kind, _, version = backend.partition("-")
            chosen: Daemon = containerd_of_version(version) if version else request.getfixturevalue("private_dockerd")
            provide_image(kind, chosen, conformance_archive)
            ready[backend] = chosen
        return ready[backend]

    return daemon


def provide_image(kind: str, daemon: Daemon, archive: Path) -> None:
    with (
        tempfile.TemporaryDirectory() as state,
        connect(kind, socket_path=str(daemon.socket), namespace=NAMESPACE, state_dir=Path(state)) as runtime,
    ):
        runtime.import_image(archive)


@pytest.fixture(scope="session", autouse=True)
def cgroup_parents() -> Iterator[None]:
    """The session's own parent of all containers' cgroups goes with it."""
    yield
    for parent in Path("/sys/fs/cgroup").glob(f"*/{NAMESPACE}"):
        parent.rmdir()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What a container is like inside is the spec's doing and runc's, and containerd hands the spec on as it is.

    So its newest release speaks for the older ones there. Limits that change go from containerd to the shim in one
    call, which the oldest and the newest have alike: they speak for the one between.
    """
    spoken_for = {"test_spec_is_real.py": OLDER_RELEASES, "test_update.py": ("containerd-1.7",)}
    older = [item for item in items if any(release in item.name for release in spoken_for.get(item.path.name, ()))]
    config.hook.pytest_deselected(items=older)
    items[:] = [item for item in items if item not in older]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def host(backend: str, daemon_of: Callable[[str], Daemon], state_dir: Path) -> Iterator[Host]:
    yield from _host(backend, daemon_of(backend), state_dir)


@pytest.fixture
def runtime(host: Host) -> ContainerRuntime:
    return host.runtime


@pytest.fixture(scope="session")
def hurt_daemon_of(
    start_containerd: StartDaemon, start_dockerd: StartDaemon, conformance_archive: Path
) -> Callable[[str], Daemon]:
    """One more daemon of a backend, that tests stop and restart; they leave it running."""

    @cache
    def daemon(backend: str) -> Daemon:
        kind, _, version = backend.partition("-")
        started = start_containerd(version) if version else start_dockerd()
        provide_image(kind, started, conformance_archive)
        return started

    return daemon


@pytest.fixture
def fragile_host(backend: str, hurt_daemon_of: Callable[[str], Daemon], state_dir: Path) -> Iterator[Host]:
    yield from _host(backend, hurt_daemon_of(backend), state_dir)


@pytest.fixture
def state_dir() -> Iterator[Path]:
    # Short, because sockets lie in it, and not pytest's own, which only root may enter.
    directory = Path(tempfile.mkdtemp(prefix="ai-state-", dir="/tmp"))
    directory.chmod(0o755)
    yield directory
    # What is kept on purpose: answers about images that hold for ever, the locks of pulls, and where containers were.
    kept = {directory / name for name in ("accounts", "pulls", "cgroup-parents")}
    left = [
        path
        for path in directory.rglob("*")
        if path not in {*kept, directory / "containers"} and path.parent not in {*kept, directory / "containers"}
    ]
    shutil.rmtree(directory)
    assert left == []


@pytest.fixture
def place(state_dir: Path) -> Iterator[Path]:
    """A directory that everybody may enter, for volumes and other files of a test."""
    directory = state_dir / "place"
    directory.mkdir(mode=0o755)
    yield directory
    shutil.rmtree(directory)


def _host(backend: str, daemon: Daemon, state_dir: Path) -> Iterator[Host]:
    kind = backend.partition("-")[0]
    before = _traces(kind, daemon)
    runtime = connect(kind, socket_path=str(daemon.socket), namespace=NAMESPACE, state_dir=state_dir)
    host = Host(backend, daemon, state_dir, runtime)
    try:
        yield host
        for id in host.made:
            runtime.remove(id)
    finally:
        for id in host.made:
            with suppress(Exception):
                runtime.remove(id)
        runtime.close()
    deadline = time.monotonic() + SETTLE_SECONDS
    while (after := _traces(kind, daemon)) != before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert after == before


def _traces(kind: str, daemon: Daemon) -> dict[str, Any]:
    """Everything that a container could leave: in the daemon, on the host, in this process."""
    directory = str(daemon.directory)
    gc.collect()
    return {
        **(_docker_traces(daemon) if kind == "docker" else _containerd_traces(daemon)),
        "mounts": sorted(
            point
            for line in _lines("/proc/self/mountinfo")
            if directory in (point := line.split()[4]) and not point.endswith(DOCKER_HOST_NETWORK)
        ),
        "cgroups": _cgroups(_cgroup_parent(kind, daemon)),
        "shims": _shims(directory),
        "threads": sorted(thread.name for thread in threading.enumerate() if _is_ours(thread.name)),
        "sockets to the daemon": sum(target.startswith("socket:") for target in _descriptors()),
        "pipes": sum(target.startswith("pipe:") for target in _descriptors()),
    }


def _is_ours(thread: str) -> bool:
    return thread.startswith(("wait-", "output-", "docker-stats"))


def _docker_traces(daemon: Daemon) -> dict[str, Any]:
    return {
        "containers": daemon.run("docker", "ps", "--all", "--quiet").stdout.split(),
        "volumes": daemon.run("docker", "volume", "ls", "--quiet").stdout.split(),
        "untagged images": daemon.run("docker", "images", "--quiet", "--filter", "dangling=true").stdout.split(),
    }


def _containerd_traces(daemon: Daemon) -> dict[str, Any]:
    snapshots = daemon.run("ctr", "--namespace", NAMESPACE, "snapshots", "list").stdout.splitlines()[1:]
    return {
        "containers": daemon.run("ctr", "--namespace", NAMESPACE, "containers", "list", "--quiet").stdout.split(),
        "tasks": daemon.run("ctr", "--namespace", NAMESPACE, "tasks", "list", "--quiet").stdout.split(),
        "leases": daemon.run("ctr", "--namespace", NAMESPACE, "leases", "list", "--quiet").stdout.split(),
        "snapshots": sorted(line.split()[0] for line in snapshots if not line.rstrip().endswith("Committed")),
    }


def _cgroups(parent: str) -> list[str]:
    """Below the parent there is one directory a container, in each hierarchy."""
    return sorted(str(path) for path in Path("/sys/fs/cgroup").glob(f"*/{parent}/*") if path.is_dir())


def _cgroup_parent(kind: str, daemon: Daemon) -> str:
    if kind == "containerd":
        return NAMESPACE
    # As hack/daemon names it.
    return "airflow-isolation-" + hashlib.sha256(str(daemon.directory).encode()).hexdigest()[:12]


def _shims(directory: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            command = (entry / "cmdline").read_bytes().decode(errors="replace") if entry.name.isdecimal() else ""
            if "containerd-shim" in command and directory in command:
                found.append(entry.name)
    return sorted(found)


def _descriptors() -> list[str]:
    found = []
    for entry in list(Path("/proc/self/fd").iterdir()):
        with suppress(OSError):
            found.append(str(entry.readlink()))
    return found


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
