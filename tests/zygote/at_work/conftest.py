"""Workloads that are forked from zygotes by the code that workers use, on real daemons, with stand-ins for Airflow.

``forms`` of zygotes: ``namespace`` (containerd, a user namespace of the image's own), ``host-network`` (the same with the
host's network), ``privilege`` (containerd, a trusted image), ``docker`` (the same there); and ``idmapped``, the first with a
runc that can map the ids of volumes. After every test nothing may be left; the last one looks for everything.
"""

from __future__ import annotations

import gc
import json
import os
import select
import shutil
import struct
import subprocess
import tempfile
import time
from configparser import ConfigParser
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.zygote.at_work import stand_ins

from airflow_isolation.bridge.start_mode import decide
from airflow_isolation.bridge.started_agent import Launch
from airflow_isolation.bridge.workload import Workload, launch
from airflow_isolation.bridge.zygote import Zygote, ZygotePlan
from airflow_isolation.bridge.zygote_plan import zygote_plan
from airflow_isolation.container_spec import Mount
from airflow_isolation.oci.identifier import new_container_id
from airflow_isolation.runtime import labels
from airflow_isolation.runtime.connect import connect
from airflow_isolation.settings.airflow_configuration import ConfiguredValue
from airflow_isolation.settings.resolve import resolve
from airflow_isolation.settings.spec import container_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from tests.conftest import Daemon, ImageArchive

    from airflow_isolation.runtime.interface import ContainerRuntime

FORMS = ("namespace", "host-network", "privilege", "docker")
OF_USER_NAMESPACES = ("namespace", "host-network", "idmapped")
NAMESPACE = f"zygotes-{os.getpid()}"
FIRST_UID = 1_700_000_000
SECONDS = 90


class Configured:
    """airflow.cfg as a test has it."""

    def __init__(self, text: str) -> None:
        self._parser = ConfigParser(interpolation=None, strict=False)
        self._parser.read_string(f"[container_runtime]\n{text}")

    def sections(self) -> Iterable[str]:
        return self._parser.sections()

    def section(self, name: str) -> Mapping[str, ConfiguredValue]:
        if not self._parser.has_section(name):
            return {}
        return {key: ConfiguredValue(text, f"[{name}] in airflow.cfg") for key, text in self._parser[name].items()}


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be launched: a container, and the zygote that it is to be forked from."""

    launch: Launch
    plan: ZygotePlan | None


@dataclass
class Running:
    """A workload under way; ``finish`` gives how it ended."""

    workload: Workload
    received: dict[str, bytearray] = field(default_factory=lambda: {"stdout": bytearray(), "stderr": bytearray()})

    @property
    def stdout(self) -> str:
        return self.received["stdout"].decode(errors="replace")

    @property
    def stderr(self) -> str:
        return self.received["stderr"].decode(errors="replace")

    @property
    def start_mode(self) -> str:
        return self.workload.start_mode

    @property
    def why_fresh(self) -> str:
        return self.workload.why_fresh

    def send(self, program: str) -> None:
        self.workload.channels.requests.sendall(struct.pack("!I", len(program.encode())) + program.encode())

    def until(self, done: Callable[[], bool]) -> None:
        """Take what the workload prints until ``done``."""
        deadline = time.monotonic() + SECONDS
        while not done():
            assert time.monotonic() < deadline, f"nothing more came: {self}"
            self.receive()
            time.sleep(0.01)

    def receive(self) -> None:
        """Take what it has printed."""
        for name, received in self.received.items():
            channel = getattr(self.workload.channels, name)
            while select.select([channel], (), (), 0)[0]:
                with suppress(ConnectionError):
                    if chunk := channel.recv(65536):
                        received.extend(chunk)
                        continue
                break

    def finish(self) -> int:
        """Until it has ended; gives its exit code."""
        self.until(lambda: self.workload.exit_code() is not None)
        self.receive()
        code = self.workload.exit_code()
        assert code is not None
        return code

    def json(self) -> Any:
        """What it printed, once it has ended without an error."""
        assert (self.finish(), self.stderr) == (0, ""), self.stdout
        return json.loads(self.stdout)


@dataclass
class Worker:
    """A worker of a backend: its runtime and state directory."""

    form: str
    runtime: ContainerRuntime
    state_dir: Path
    bundle: Path
    provide: Callable[[str], str]
    runtime_binary: str = ""
    started: list[Running] = field(default_factory=list)

    @cached_property
    def backend(self) -> str:
        return "docker" if self.form == "docker" else "containerd"

    def task(
        self,
        kind: str = "good",
        *,
        cfg: str = "",
        environment: Any = None,
        author: bool = False,
        written: Mapping[str, Any] | None = None,
        volumes: Iterable[Mount] = (),
    ) -> Task:
        """A task of a stand-in's image, as the coordinator would launch it.

        ``cfg`` goes to [container_runtime]; ``author``: it is the DAG's author who named the image; ``written``: what
        else of the container the author wrote.
        """
        image = self.provide(kind)
        uids = f"{FIRST_UID}:{64 * 65536}" if self.form in OF_USER_NAMESPACES else "none"
        named = "named/by-nobody:1" if author else image
        network = "host" if self.form == "host-network" else "none"
        text = f"image = {named}\nimage_pull_policy = never\nnetwork = {network}\nuid_range = {uids}\nstate_dir = {self.state_dir}\n"
        if self.runtime_binary:
            cfg += f"\n[containerd_runtime]\nruntime_binary = {self.runtime_binary}"
        settings = resolve(
            "task",
            "docker" if self.form == "docker" else "containerd",
            # What is set twice has its last value.
            configuration=Configured(f"{text}\n{cfg}"),
            executor_config={"container": {**({"image": image} if author else {}), **(written or {})}},
        )
        spec = container_spec(
            settings,
            argv=(),
            mounts=(Mount(source=str(self.bundle), target=str(self.bundle)), *volumes),
            labels={labels.PURPOSE: "task", labels.OWNER: str(labels.Owner.this_process())},
        )
        found = self.runtime.ensure_image(image)
        decision = decide(settings, spec, runtime=self.runtime, image_digest=found.digest)
        forwarded = {"AIRFLOW_HOME": "/tmp/.airflow", **(environment or {})}
        wanted = Launch(
            id=new_container_id("task"),
            spec=decision.applied_to(spec),
            image=found,
            purpose="task",
            environment=forwarded,
            airflow=stand_ins.AIRFLOW,
            python=settings.python,
            start_timeout=settings.start_timeout,
        )
        if decision.mode != "fork":
            return Task(wanted, None)
        plan = zygote_plan(settings, wanted, decision, environment=forwarded, mounts=(), settings_digest="")
        return Task(wanted, plan)

    def start(self, task: Task, program: str = "") -> Running:
        running = Running(launch(self.runtime, task.launch, state_dir=self.state_dir, plan=task.plan))
        self.started.append(running)
        running.send(program)
        return running

    def run(self, program: str = "", kind: str = "good", **more: Any) -> Running:
        """One more task, started."""
        return self.start(self.task(kind, **more), program)

    def directory(self, task: Task) -> Path:
        assert task.plan
        return self.state_dir / "zygotes" / task.plan.key

    def zygote(self, task: Task) -> Zygote:
        """The living zygote of a task."""
        directory = self.directory(task)
        record = json.loads((directory / "record.json").read_bytes())
        return Zygote(container=record["container"], pid=record["pid"], directory=directory)

    def end(self) -> None:
        """All tasks are closed; zygotes live on."""
        while self.started:
            running = self.started.pop()
            running.workload.close()
            for name in ("requests", "stdout", "stderr", "logs"):
                getattr(running.workload.channels, name).close()

    def remove_zygotes(self) -> None:
        for container in self.runtime.list({labels.PURPOSE: "zygote"}):
            self.runtime.remove(container.id)
        shutil.rmtree(self.state_dir / "zygotes", ignore_errors=True)
        self.runtime.remove_unused_roots()

    def close(self) -> None:
        self.end()
        self.remove_zygotes()
        self.runtime.close()


@contextmanager
def short_lived_worker(
    daemon: Daemon, archive: Path, form: str = "namespace", runtime_binary: str = ""
) -> Iterator[Worker]:
    """For a suite of another kernel: a worker; ``archive`` is of an image without Airflow."""
    with tempfile.TemporaryDirectory(prefix="ai-z-", dir="/var/tmp") as directory:
        place = Path(directory)
        place.chmod(0o755)
        bundle = place / "dags"
        bundle.mkdir(mode=0o755)
        runtime = connect(
            daemon.kind,
            socket_path=str(daemon.socket),
            namespace=NAMESPACE,
            state_dir=place / "s",
            runtime_binary=runtime_binary,
        )
        runtime.import_image(stand_ins.stand_in(archive, place / "good.tar", "good"))
        worker = Worker(form, runtime, place / "s", bundle, stand_ins.reference, runtime_binary)
        try:
            yield worker
        finally:
            worker.close()


def until(happens: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not happens():
        assert time.monotonic() < deadline, f"Waited in vain for {what}"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


@pytest.fixture(scope="session")
def provided(image_archive: ImageArchive, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Daemon, str], str]:
    """Have a stand-in's image in a daemon; gives its name."""
    directory = tmp_path_factory.mktemp("stand-ins")

    @cache
    def archive(kind: str) -> Path:
        return stand_ins.stand_in(image_archive("no-airflow"), directory / f"{kind}.tar", kind)

    @cache
    def have(daemon: Daemon, kind: str) -> str:
        with (
            tempfile.TemporaryDirectory() as state,
            connect(daemon.kind, socket_path=str(daemon.socket), namespace=NAMESPACE, state_dir=Path(state)) as runtime,
        ):
            runtime.import_image(archive(kind))
        return stand_ins.reference(kind)

    return have


@pytest.fixture(scope="session")
def newer_runc() -> str:
    """The path of a runc that can map the ids of mounts, which the daemons' own can't."""
    script = '. "$1"/hack/setup/all.sh; newer_runc'
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        ["bash", "-ec", script, "-", str(root)], stdout=subprocess.PIPE, text=True, check=True, timeout=300
    )
    return done.stdout.strip()


@pytest.fixture(scope="session", autouse=True)
def cgroup_parents() -> Iterator[None]:
    """The session's own parent of all containers' cgroups goes with it."""
    yield
    for parent in Path("/sys/fs/cgroup").glob(f"*/{NAMESPACE}"):
        parent.rmdir()


@pytest.fixture(scope="module")
def state_dir() -> Iterator[Path]:
    """Short, because of sockets; not pytest's own, which only root may enter."""
    directory = Path(tempfile.mkdtemp(prefix="ai-z-", dir="/var/tmp"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test has the form without privilege, unless it says more."""
    said = [marker.args[0] for marker in metafunc.definition.iter_markers("parametrize")]
    if "form" in metafunc.fixturenames and "form" not in said:
        metafunc.parametrize("form", FORMS[:1], indirect=True)


@pytest.fixture(scope="module")
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def long_lived(
    form: str, request: pytest.FixtureRequest, state_dir: Path, provided: Callable[[Daemon, str], str]
) -> Iterator[Worker]:
    """The module's worker of a form, whose zygotes outlive tests."""
    daemon: Daemon = request.getfixturevalue("private_dockerd" if form == "docker" else "private_containerd")
    place = state_dir / f"{form[0]}{len(list(state_dir.iterdir()))}"
    place.mkdir(mode=0o755, exist_ok=True)
    bundle = place / "dags"
    bundle.mkdir(mode=0o755, exist_ok=True)
    backend = "docker" if form == "docker" else "containerd"
    # A directory whose sockets have paths of more than 107 bytes is as good as a short one.
    state = place / ("s" * 90 if form == "privilege" else "s")
    binary = request.getfixturevalue("newer_runc") if form == "idmapped" else ""
    runtime = connect(
        backend,
        socket_path=str(daemon.socket),
        namespace=NAMESPACE,
        state_dir=state,
        runtime_binary=binary,
    )
    worker = Worker(form, runtime, state, bundle, lambda kind: provided(daemon, kind), binary)
    try:
        yield worker
    finally:
        worker.close()


@pytest.fixture
def worker(long_lived: Worker) -> Iterator[Worker]:
    """After the test nothing is left of its tasks; zygotes live on, for the next."""
    yield long_lived
    long_lived.end()
    left = left_of_tasks(long_lived)
    assert not any(left.values()), left


def left_of_tasks(worker: Worker) -> dict[str, list[str]]:
    """What workloads could leave."""
    gc.collect()
    zygotes = {container.id for container in worker.runtime.list({labels.PURPOSE: "zygote"})}

    def found(pattern: str) -> list[str]:
        return [str(path) for path in worker.state_dir.glob(pattern) if path.name not in zygotes]

    return {
        "containers": [container.id for container in worker.runtime.list() if container.id not in zygotes],
        "directories": [*found("workloads/*"), *found("containers/*/*"), *found("spares/*/*")],
        "cgroups": [
            str(path)
            for pattern in (f"*/{NAMESPACE}/task-*", f"{NAMESPACE}/**/task-*")
            for path in Path("/sys/fs/cgroup").glob(pattern)
        ],
    }
