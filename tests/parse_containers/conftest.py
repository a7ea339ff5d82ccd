"""Parse containers on dockerd and on containerd, both real and private.

After every test it is checked that nothing of it is left: containers in the daemon, directories, threads, descriptors.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import textwrap
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.parse_containers import images
from tests.parse_containers.parsing import Parse, parse

from airflow_isolation.bridge.parse_container import ParseContainer, start_parse_container
from airflow_isolation.bridge.started_agent import Launch
from airflow_isolation.container_spec import ContainerSpec, Mount, Resources
from airflow_isolation.oci import new_container_id
from airflow_isolation.runtime.connect import connect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Daemon, ImageArchive, ImageName, StartDaemon

    from airflow_isolation.runtime.interface import ContainerRuntime

BACKENDS = ("containerd-2.1", "docker")
NAMESPACE = f"parse-{os.getpid()}"
SETTLE_SECONDS = 20

#: For the import in process 1, as integration/workload_environment.py gives it.
ENVIRONMENT = {
    "AIRFLOW_HOME": "/tmp/.airflow",
    "AIRFLOW_CONFIG": os.devnull,
    "PYTHON_OPERATORS_VIRTUAL_ENV_MODE": "1",
    "AIRFLOW__LOGGING__BASE_LOG_FOLDER": "/tmp/.airflow/logs",
    "AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_STORAGE_PATH": "/tmp/.airflow/bundles",
    "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
}

HEALTHY = """
from airflow.sdk import DAG, task
with DAG("healthy", schedule=None):
    @task
    def work(): pass
    work()
"""

#: What a file finds: prints it as one JSON object.
INSPECTION = """
import json, os
def found(directory):
    return sorted(os.path.join(at, name) for at, names, files in os.walk(directory) for name in (*names, *files))
def inode(number):
    try:
        return os.fstat(number).st_ino
    except OSError:  # the listing's own
        return os.fstat(0).st_ino
descriptors = {inode(int(name)) for name in os.listdir("/proc/self/fd")}
def size(path):
    return len(open(path).readlines()) - 1
print(json.dumps({
    "processes": sorted(int(name) for name in os.listdir("/proc") if name.isdecimal() and int(name) != os.getpid()),
    "files": [path for top in ("/tmp", "/dev/shm", "/dev/mqueue") for path in found(top)],
    "ipc": [size("/proc/sysvipc/" + kind) for kind in ("shm", "msg", "sem")],
    # Airflow keeps a copy of its stderr.
    "descriptors": len(descriptors - {os.fstat(number).st_ino for number in range(4)}),
}))
"""
NOTHING_LEFT = {"processes": [1], "files": [], "ipc": [0, 0, 0], "descriptors": 0}


@dataclass
class Host:
    """A daemon, a runtime on it, and a bundle whose files a test writes."""

    backend: str
    daemon: Daemon
    runtime: ContainerRuntime
    state_dir: Path
    bundle: Path
    image: str
    started: list[ParseContainer] = field(default_factory=list)

    def write(self, name: str, program: str) -> Path:
        path = self.bundle / name
        # Airflow's safe mode passes over what does not look like a DAG file.
        path.write_text("# airflow DAG\n" + textwrap.dedent(program))
        return path

    def spec(self, *, limits: Any = None, **changes: Any) -> ContainerSpec:
        mounts = (Mount(source=str(self.bundle), target=str(self.bundle)), *changes.pop("mounts", ()))
        if limits:
            changes["resources"] = Resources(**limits)
        return ContainerSpec(argv=(), mounts=mounts, **{"image": self.image, "network": "none", **changes})

    def launch(self, *, start_timeout: float = 120, environment: Any = None, **changes: Any) -> Launch:
        spec = self.spec(**changes)
        return Launch(
            id=new_container_id("parse"),
            spec=spec,
            image=self.runtime.ensure_image(spec.image),
            purpose="parse",
            environment={**ENVIRONMENT, **(environment or {})},
            airflow=images.AIRFLOW,
            start_timeout=start_timeout,
        )

    def start(self, **changes: Any) -> ParseContainer:
        """One more parse container, which goes with the test."""
        container = start_parse_container(self.runtime, self.launch(**changes), state_dir=self.state_dir)
        self.started.append(container)
        return container

    def parse(self, container: ParseContainer, program: str, **environment: str) -> Parse:
        return parse(container, self.write("file.py", program), environment)

    def close(self) -> None:
        for container in self.started:
            container.close()
        self.runtime.close()


@pytest.fixture(scope="session")
def stand_in(image_archive: ImageArchive, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``stand_in("raising")``: the archive of that kind of stand-in for Airflow."""
    directory = tmp_path_factory.mktemp("stand-ins")

    @cache
    def archive(kind: str) -> Path:
        return images.stand_in(image_archive("no-airflow"), directory / f"{kind}.tar", kind)

    return archive


@pytest.fixture(scope="session")
def provide(image_archive: ImageArchive, image_name: ImageName, stand_in: Callable[[str], Path]) -> Callable[..., str]:
    """``provide(daemon, "main")``: have an image in a daemon; gives its name."""
    done: dict[tuple[Path, str], str] = {}

    def have(daemon: Daemon, kind: str) -> str:
        if (daemon.directory, kind) not in done:
            ours = kind in images.STAND_INS
            with (
                tempfile.TemporaryDirectory() as state,
                connect(
                    daemon.kind, socket_path=str(daemon.socket), namespace=NAMESPACE, state_dir=Path(state)
                ) as runtime,
            ):
                runtime.import_image(stand_in(kind) if ours else image_archive(kind))
            done[daemon.directory, kind] = images.reference(kind) if ours else image_name(kind)
        return done[daemon.directory, kind]

    return have


@pytest.fixture(params=BACKENDS, scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def daemon(backend: str, containerd_of_version: Callable[[str], Daemon], request: pytest.FixtureRequest) -> Daemon:
    _, _, version = backend.partition("-")
    chosen: Daemon = containerd_of_version(version) if version else request.getfixturevalue("private_dockerd")
    return chosen


@pytest.fixture(scope="session")
def hurt_daemon(backend: str, start_containerd: StartDaemon, start_dockerd: StartDaemon) -> Daemon:
    """One more daemon, that tests freeze and kill; they leave it running."""
    _, _, version = backend.partition("-")
    return start_containerd(version) if version else start_dockerd()


@pytest.fixture(scope="session", autouse=True)
def cgroup_parents() -> Iterator[None]:
    """The session's own parent of all containers' cgroups goes with it."""
    yield
    for parent in Path("/sys/fs/cgroup").glob(f"*/{NAMESPACE}"):
        parent.rmdir()


@pytest.fixture
def directories() -> Iterator[tuple[Path, Path]]:
    """A state directory and a bundle. Short, because of sockets; not pytest's own, which only root may enter."""
    top = Path(tempfile.mkdtemp(prefix="ai-parse-", dir="/var/tmp"))
    top.chmod(0o755)
    state_dir, bundle = top / "s", top / "dags"
    state_dir.mkdir(mode=0o755)
    bundle.mkdir(mode=0o755)
    yield state_dir, bundle
    workloads = state_dir / "workloads"
    left = list(workloads.iterdir()) if workloads.exists() else []
    shutil.rmtree(top)
    assert left == []


@pytest.fixture
def host(backend: str, daemon: Daemon, provide: Callable[..., str], directories: tuple[Path, Path]) -> Iterator[Host]:
    """With the real image as its default."""
    yield from _host(backend, daemon, provide(daemon, "main"), directories)


@pytest.fixture
def light_host(
    backend: str, daemon: Daemon, provide: Callable[..., str], directories: tuple[Path, Path]
) -> Iterator[Host]:
    """With the stand-in for Airflow, whose containers start in a moment."""
    yield from _host(backend, daemon, provide(daemon, "good"), directories)


@pytest.fixture
def fragile_host(
    backend: str, hurt_daemon: Daemon, provide: Callable[..., str], directories: tuple[Path, Path]
) -> Iterator[Host]:
    """As ``light_host``, on a daemon that may be hurt."""
    yield from _host(backend, hurt_daemon, provide(hurt_daemon, "good"), directories)


def _host(backend: str, daemon: Daemon, image: str, directories: tuple[Path, Path]) -> Iterator[Host]:
    state_dir, bundle = directories
    before = _traces(daemon)
    runtime = connect(
        backend.partition("-")[0], socket_path=str(daemon.socket), namespace=NAMESPACE, state_dir=state_dir
    )
    host = Host(backend, daemon, runtime, state_dir, bundle, image)
    try:
        yield host
    finally:
        host.close()
    deadline = time.monotonic() + SETTLE_SECONDS
    while (after := _traces(daemon)) != before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert after == before


def _traces(daemon: Daemon) -> dict[str, Any]:
    """What a parse container, or a pool of them, could leave."""
    gc.collect()
    if daemon.kind == "docker":
        containers = daemon.run("docker", "ps", "--all", "--quiet").stdout.split()
    else:
        containers = daemon.run("ctr", "--namespace", NAMESPACE, "containers", "list", "--quiet").stdout.split()
    return {
        "containers": containers,
        "threads": sorted(
            thread.name
            for thread in threading.enumerate()
            if thread.name.startswith(("wait-", "kill-", "stop-", "parse-"))
        ),
        "descriptors": sorted(target.partition(":")[0] for target in _descriptors() if "grpc" not in target),
    }


def _descriptors() -> list[str]:
    found = []
    for entry in list(Path("/proc/self/fd").iterdir()):
        with suppress(OSError):
            target = str(entry.readlink())
            if target.startswith(("socket:", "pipe:", "anon_inode:[eventfd]", "anon_inode:[eventpoll]")):
                found.append(target)
    return found
