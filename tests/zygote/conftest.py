"""Two containers of one image: a workload's, and one whose file system the driver runs in, in the zygote's place."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from airflow_isolation import agent
from airflow_isolation.bridge.process_one import ProcessOne, read_process_one
from airflow_isolation.container_spec import ContainerSpec, Mount, UserNamespace
from airflow_isolation.oci import load_profile, new_container_id, read_host, resolve_profile
from airflow_isolation.oci.seccomp_filter import compile_filter, filter_flags
from airflow_isolation.runtime.connect import connect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Daemon, ImageArchive, ImageName

    from airflow_isolation.runtime.interface import ContainerRuntime

HERE = Path(__file__).parent
PLACE = "/run/airflow-isolation"
EXCHANGE = "/exchange"
NAMESPACE = f"zygote-{os.getpid()}"
SECONDS = 240


@dataclass(frozen=True)
class Running:
    """A container whose process 1 waits for what is forked into it."""

    id: str
    pid: int
    spec: ContainerSpec
    exchange: Path
    zygote_pid: int

    @property
    def first_id(self) -> int:
        """The host's number of the container's root."""
        return self.spec.user_namespace.first if self.spec.user_namespace else 0

    @property
    def process_one(self) -> ProcessOne:
        return read_process_one(self.pid, uid_base=self.first_id)

    def program(self) -> tuple[bytes, int]:
        """The seccomp filter and its flags, as the worker would compile them."""
        profile = load_profile(self.spec.seccomp)
        if profile is None:
            return b"", 0
        host = read_host()
        resolved = resolve_profile(
            profile, architecture=host.architecture, capabilities=self.spec.capabilities, kernel=host.kernel
        )
        return compile_filter(resolved), filter_flags(resolved, speculation=self.process_one.speculation)

    def process(self) -> dict[str, Any]:
        program, flags = self.program()
        return self.process_one.as_message(seccomp=program, seccomp_flags=flags)

    def fork(self, program: str = "", *, source: str = "", **changes: Any) -> subprocess.Popen[bytes]:
        """The driver, whose child runs a program of this directory, or ``source``, in this container."""
        if source:
            program = f"{EXCHANGE}/program.py"
            (self.exchange / "program.py").write_text(source)
        order = {
            "process": {**self.process(), **changes.pop("process", {})},
            "environment": dict(self.process_one.environment),
            "program": program,
            **changes,
        }
        in_host_network = self.spec.user_namespace and self.spec.network == "host"
        # The driver is in the host's network already, from which nobody may enter it again.
        kinds = ("ipc", "uts", "cgroup", *(() if in_host_network else ("net",)), "pid", "mnt")
        opened = [os.open(f"/proc/{self.pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in kinds]
        order["namespaces"] = opened
        namespaces = [f"--mount=/proc/{self.zygote_pid}/ns/mnt"]
        if self.spec.user_namespace:
            # Powerful there, and nobody on the host.
            namespaces += [f"--user=/proc/{self.zygote_pid}/ns/user", "--setuid=0", "--setgid=0"]
        driver_program = ("/usr/bin/env", "-i", "PATH=/usr/local/bin:/usr/bin:/bin", "python3", f"{PLACE}/driver.py")
        driver = subprocess.Popen(
            ["nsenter", *namespaces, *driver_program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=opened,
        )
        for descriptor in opened:
            os.close(descriptor)
        assert driver.stdin
        # The worker's part.
        for line in Path(f"/proc/{self.pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            mount = {"": "unified", "name=systemd": "systemd"}.get(controllers, controllers)
            directory = Path("/sys/fs/cgroup", *((mount,) if os.path.ismount(f"/sys/fs/cgroup/{mount}") else ()))
            (directory / path.strip("/") / "cgroup.procs").write_text(str(driver.pid))
        driver.stdin.write(json.dumps(order).encode())
        driver.stdin.close()
        driver.stdin = None
        return driver

    def forked_pid(self) -> int:
        """The host's number of the process that was forked into this container, once it is a child of process 1."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        self.until(lambda: bool(children.read_text().split()))
        return int(children.read_text().split()[0])

    def until(self, happens: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not happens():
            assert time.monotonic() < deadline, "It did not happen in time"
            time.sleep(0.01)

    def forked(self, program: str = "", **more: Any) -> Any:
        """What the program says in JSON, run by a process that was forked into this container."""
        with self.fork(program, **more) as driver:
            output, errors = driver.communicate(timeout=SECONDS)
        assert not errors, errors.decode()
        return json.loads(output)

    def fresh(self) -> Any:
        """What process 1's own workload says in JSON."""
        path = self.exchange / "fresh"
        self.until(path.exists)
        return json.loads(path.read_bytes())


@dataclass
class Host:
    runtime: ContainerRuntime
    image: str
    place: Path
    made: list[str] = field(default_factory=list)
    directories: list[Path] = field(default_factory=list)
    zygotes: dict[tuple[UserNamespace | None, str], int] = field(default_factory=dict)

    def start(self, *argv: str, **changes: Any) -> tuple[str, int, ContainerSpec]:
        place = Mount(source=str(self.place), target=PLACE)
        spec = ContainerSpec(argv=argv, image=self.image, mounts=(place,))
        spec = replace(spec, **{**changes, "mounts": (place, *changes.pop("mounts", ()))})
        id = new_container_id("test")
        self.runtime.create(id, spec)
        self.made.append(id)
        return id, self.runtime.start(id), spec

    def workload(self, program: str = "", **changes: Any) -> Running:
        """A container; ``program`` is what its process 1 starts as its own workload."""
        namespace = changes.get("user_namespace")
        network = changes.setdefault("network", "none")
        zygote_pid = self.zygotes.get((namespace, network))
        if zygote_pid is None:
            zygote_pid = self.start("sleep", "600", user_namespace=namespace, network=network)[1]
            self.zygotes[namespace, network] = zygote_pid
        if namespace:
            changes["user_namespace"] = replace(namespace, path=f"/proc/{zygote_pid}/ns/user")
        exchange = Path(tempfile.mkdtemp(prefix="ai-exchange-", dir="/var/tmp"))
        self.directories.append(exchange)
        exchange.chmod(0o777)
        mounts = (Mount(source=str(exchange), target=EXCHANGE, read_only=False), *changes.pop("mounts", ()))
        argv = ("python3", f"{PLACE}/first.py", EXCHANGE, program or f"{PLACE}/nothing.py")
        id, pid, spec = self.start(*argv, mounts=mounts, **changes)
        running = Running(id, pid, spec, exchange, zygote_pid)
        # runc's init is process 1 until it executes ours.
        running.until(lambda: b"first.py" in Path(f"/proc/{pid}/cmdline").read_bytes())
        return running


@pytest.fixture(scope="session")
def place() -> Iterator[Path]:
    """What is mounted into the containers: pytest's own directories can be entered by root only."""
    directory = Path(tempfile.mkdtemp(prefix="ai-place-", dir="/var/tmp"))
    directory.chmod(0o755)
    agent.copy_to(directory)
    for source in (
        HERE / "observe.py",
        HERE / "calls.py",
        HERE / "first.py",
        HERE / "driver.py",
        HERE.parent / "probe" / "probe.py",
    ):
        shutil.copyfile(source, directory / source.name)
    (directory / "nothing.py").touch()
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def readable() -> Iterator[Path]:
    """A directory that any user may read."""
    directory = Path(tempfile.mkdtemp(prefix="ai-readable-", dir="/var/tmp"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def daemon(private_containerd: Daemon, image_archive: ImageArchive) -> Daemon:
    with (
        tempfile.TemporaryDirectory() as state,
        connect(
            "containerd", socket_path=str(private_containerd.socket), namespace=NAMESPACE, state_dir=Path(state)
        ) as runtime,
    ):
        runtime.import_image(image_archive("no-airflow"))
    return private_containerd


@pytest.fixture
def host(daemon: Daemon, image_name: ImageName, place: Path) -> Iterator[Host]:
    state = Path(tempfile.mkdtemp(prefix="ai-state-", dir="/tmp"))
    state.chmod(0o755)
    runtime = connect("containerd", socket_path=str(daemon.socket), namespace=NAMESPACE, state_dir=state)
    host = Host(runtime, image_name("no-airflow"), place)
    try:
        yield host
    finally:
        for id in host.made:
            runtime.remove(id)
        runtime.close()
        for directory in (*host.directories, state):
            shutil.rmtree(directory)
