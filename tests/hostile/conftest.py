"""One container of each kind of start, in which ``inside.py`` tries everything once; the tests look at what was seen.

Real daemons, kernels and agents; Airflow is a stand-in, which loads in a moment and runs the text that it is given. Each
kind has a neighbour: another container of the same kind and user, which notices what reaches it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.hostile import inside
from tests.parse_containers.parsing import begin
from tests.zygote.at_work import stand_ins
from tests.zygote.at_work.conftest import Worker, until

from airflow_isolation.bridge.parse_container import Ended, ParseContainer, start_parse_container
from airflow_isolation.oci.identifier import new_container_id
from airflow_isolation.runtime.connect import connect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Daemon, ImageArchive
    from tests.parse_containers.parsing import Parse
    from tests.zygote.at_work.conftest import Running

NAMESPACE = f"hostile-{os.getpid()}"
MIB = 1024 * 1024

#: Small, so that a bound is soon reached.
BOUNDS = "tmp_size = 4Mi\nshm_size = 2Mi\npids = 48"

#: linux/capability.h. Those with which the attempts have a way.
CAPABILITIES = {
    "CHOWN": 0,
    "DAC_OVERRIDE": 1,
    "DAC_READ_SEARCH": 2,
    "FOWNER": 3,
    "SETGID": 6,
    "SETUID": 7,
    "SETPCAP": 8,
    "NET_BIND_SERVICE": 10,
    "NET_ADMIN": 12,
    "NET_RAW": 13,
    "SYS_CHROOT": 18,
    "SYS_PTRACE": 19,
    "SYS_PACCT": 20,
    "SYS_ADMIN": 21,
    "SYS_NICE": 23,
    "SYS_RESOURCE": 24,
    "MKNOD": 27,
    "SYSLOG": 34,
}


def worker_holds(capability: int) -> bool:
    """Nobody can give a container what he lacks himself."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff")]
    return bool(int(line.split()[1], 16) >> capability & 1)


#: No guard that a setting can take away. What holds even so has a control of another kind.
WITHOUT_GUARDS = f"""
start_mode = fresh
network = host
seccomp_profile = unconfined
run_as_user = 0
read_only_root = False
tmp_size = 64Mi
shm_size = 64Mi
capabilities = {", ".join(name for name, number in CAPABILITIES.items() if worker_holds(number))}
[container_runtime_policy]
allow_root = True
"""


@dataclass(frozen=True)
class Kind:
    """How a container is started, and by which daemon."""

    name: str
    backend: str
    network: str
    start: str  # the start mode of a task, or "parse"
    cfg: str = BOUNDS
    user_namespace: bool = False

    @property
    def form(self) -> str:
        """As tests/zygote/at_work calls it."""
        return "docker" if self.backend == "docker" else "namespace" if self.user_namespace else "privilege"


KINDS = (
    Kind("forked with privilege", "containerd", "host", "fork"),
    Kind("forked in a user namespace", "containerd", "none", "fork", user_namespace=True),
    Kind("forked in a user namespace with the host's network", "containerd", "host", "fork", user_namespace=True),
    Kind("fresh", "containerd", "none", "fresh"),
    Kind("parse", "containerd", "host", "parse"),
    Kind("forked on Docker", "docker", "host", "fork"),
    Kind("fresh on Docker", "docker", "none", "fresh"),
    Kind("parse on Docker", "docker", "host", "parse"),
)
TASKS = tuple(kind for kind in KINDS if kind.start != "parse")
UNGUARDED = tuple(
    Kind(f"without guards on {backend}", backend, "host", "fresh", WITHOUT_GUARDS)
    for backend in ("containerd", "docker")
)

#: What a neighbour does: it counts the signals that come, until it is told to end.
NEIGHBOUR = """
import json, os, signal
came = []
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
    signal.signal(number, lambda number, _: came.append(number))
print("up", flush=True)
os.read(0, 1)
print(json.dumps({"signals": came, "nice": os.getpriority(os.PRIO_PROCESS, 0), "first": os.getpriority(os.PRIO_PROCESS, 1)}))
"""


@dataclass
class Report:
    """What was seen from inside a container of a kind, and what the host saw of it."""

    #: By attempt, what it saw.
    said: dict[str, str] = field(default_factory=dict)
    #: What the next workload of the same zygote or parse container found.
    remains: dict[str, Any] = field(default_factory=dict)
    neighbour: dict[str, Any] = field(default_factory=dict)
    #: Processes of the container that still ran when the worker had been told of its end.
    left: list[str] = field(default_factory=list)
    same_zygote: bool = True


class Place:
    """A worker's place on the host: state, a bundle with what authors may put there, and secrets of others."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.state_dir, self.bundle = top / "s", top / "dags"
        self.mark = f"ai-hostile-{secrets.token_hex(8)}"
        self.secret_file = top / "secret"
        self.secret_file.write_text("a secret of the host's")
        self.bundle.mkdir(mode=0o777)
        (self.bundle / "__pycache__").mkdir()
        for name in ("sales.py", "__pycache__/sales.pyc"):
            (self.bundle / name).write_text("# airflow DAG")
        (self.bundle / "link-to-secret").symlink_to(self.secret_file)
        # The task's own user's, so that nothing but the mount keeps it from changing them.
        for path in (self.bundle, *self.bundle.rglob("*")):
            os.chown(path, 50000, 0, follow_symlinks=False)
        (self.bundle / "disturb.py").touch()

    def files_of_bundle(self) -> dict[str, tuple[bytes, int]]:
        return {
            str(path.relative_to(self.bundle)): (path.read_bytes(), path.stat().st_mode)
            for path in self.bundle.rglob("*")
            if path.is_file() and path.suffix != ".program"
        }


@contextmanager
def place() -> Iterator[Place]:
    """Short, because of sockets; not pytest's own, which only root may enter."""
    top = Path(tempfile.mkdtemp(prefix="ai-h-", dir="/var/tmp"))
    top.chmod(0o755)
    try:
        yield Place(top)
    finally:
        shutil.rmtree(top)


@dataclass
class Host:
    """A worker of one kind, which starts containers of it."""

    kind: Kind
    worker: Worker
    place: Place
    undo: ExitStack

    def start(self, program: str, *, environment: dict[str, str] | None = None, cfg: str = "") -> Running:
        """A task of this kind, with this program."""
        text = f"network = {self.kind.network}\nstart_mode = {self.kind.start}\n{self.kind.cfg}"
        # Lines of a cfg of ours come first: the kind's may have sections.
        running = self.worker.start(self.worker.task("visited", cfg=f"{cfg}\n{text}", environment=environment), program)
        assert running.start_mode == self.kind.start, running.why_fresh
        return running

    def start_parse_container(self) -> ParseContainer:
        task = self.worker.task("visited", cfg=f"network = {self.kind.network}\nstart_mode = fresh\n{self.kind.cfg}")
        launch = replace(task.launch, id=new_container_id("parse"), purpose="parse")
        container = start_parse_container(self.worker.runtime, launch, state_dir=self.place.state_dir)
        self.undo.callback(container.close)
        return container

    def begin_parse(self, container: ParseContainer, program: str) -> Parse:
        file = self.place.bundle / f"{secrets.token_hex(4)}.program"
        file.write_text(program)
        return begin(container, file)

    def zygote(self) -> int:
        text = f"network = {self.kind.network}\nstart_mode = fork\n{self.kind.cfg}"
        return self.worker.zygote(self.worker.task("visited", cfg=text)).pid


def visit(host: Host, told: dict[str, Any]) -> Report:
    """Try everything from inside, then look what came of it."""
    report = Report()
    if host.kind.start == "parse":
        neighbour = host.begin_parse(host.start_parse_container(), NEIGHBOUR)
        neighbour.until(lambda: "up" in neighbour.stdout)
        container = host.start_parse_container()
        told = {**told, "pids": [*told["pids"], container.container.pid], "sockets": sockets(host, told)}
        parse = host.begin_parse(container, program("attempts", told, "disturb"))
        assert (parse.finish(), parse.stderr) == (Ended(0, out_of_memory=False), ""), parse.stdout
        report.said = json.loads(parse.stdout)
        report.left = marked(told["mark"])
        after = host.begin_parse(container, program("remains", told))
        assert (after.finish(), after.stderr) == (Ended(0, out_of_memory=False), ""), after.stdout
        report.remains = json.loads(after.stdout)
        neighbour.channels[0].sendall(b"x")  # type: ignore[union-attr]
        neighbour.finish()
        report.neighbour = json.loads(neighbour.stdout.removeprefix("up\n"))
        return report
    by = host.start(NEIGHBOUR)
    by.until(lambda: "up" in by.stdout)
    zygote = host.zygote() if host.kind.start == "fork" else 0
    pids = [*told["pids"], by.workload.container.pid, *([zygote] if zygote else [])]
    told = {**told, "pids": pids, "sockets": sockets(host, told)}
    report.said = host.start(program("attempts", told, "disturb")).json()
    report.left = marked(told["mark"])
    report.remains = host.start(program("remains", told)).json()
    report.same_zygote = not zygote or host.zygote() == zygote
    by.workload.channels.requests.send(b"x")
    assert (by.finish(), by.stderr) == (0, "")
    report.neighbour = json.loads(by.stdout.removeprefix("up\n"))
    return report


def sockets(host: Host, told: dict[str, Any]) -> list[str]:
    """With those that agents and zygotes are waited for at."""
    return [*told["sockets"], *(str(path) for path in host.place.state_dir.rglob("*.sock"))]


def program(function: str, told: dict[str, Any], last: str = "") -> str:
    """The text of ``inside.py``, and a call whose result it prints; ``last`` is called when that has been printed."""
    text = Path(inside.__file__).read_text()
    text += f"\nimport json\ntold = json.loads({json.dumps(told)!r})\nprint(json.dumps({function}(told)), flush=True)\n"
    return text + (f"{last}(told)\n" if last else "")


def marked(mark: str) -> list[str]:
    """The processes of this host that a task has started as its daemons."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


@pytest.fixture(scope="session")
def secret() -> Iterator[str]:
    """What the worker has and no container may have, as a pattern; it is in the worker's environment."""
    value = f"ai-secret-{secrets.token_hex(16)}"
    names = (
        "AIRFLOW__CELERY__BROKER_URL",
        "AIRFLOW__API_AUTH__JWT_SECRET",
        "AIRFLOW_CONN_PAYROLL",
        "AIRFLOW_VAR_PAYROLL",
        "OF_NOBODY",
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setenv(name, f"postgresql://u:{value}@h/d")
        yield "ai-secret-[0-9a-f]{32}"


@pytest.fixture(scope="session")
def archive(image_archive: ImageArchive, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with a stand-in for Airflow."""
    return stand_ins.stand_in(
        image_archive("no-airflow"), tmp_path_factory.mktemp("visited") / "visited.tar", "visited"
    )


@pytest.fixture(scope="session")
def daemon_of(request: pytest.FixtureRequest, archive: Path) -> Callable[[str], Daemon]:
    """The session's daemon of a backend, with the image."""

    @cache
    def start(backend: str) -> Daemon:
        name = "private_dockerd" if backend == "docker" else "private_containerd"
        daemon: Daemon = request.getfixturevalue(name)
        with (
            tempfile.TemporaryDirectory() as state,
            connect(backend, socket_path=str(daemon.socket), namespace=NAMESPACE, state_dir=Path(state)) as runtime,
        ):
            runtime.import_image(archive)
        return daemon

    return start


@pytest.fixture(scope="session")
def hosts(daemon_of: Callable[[str], Daemon], secret: str) -> Iterator[Callable[[Kind], Any]]:
    """``with hosts(kind) as host:`` has a worker of a kind, of which nothing is left after the block."""

    @contextmanager
    def a_host(kind: Kind) -> Iterator[Host]:
        daemon = daemon_of(kind.backend)
        with place() as where:
            runtime = connect(
                kind.backend, socket_path=str(daemon.socket), namespace=NAMESPACE, state_dir=where.state_dir
            )
            worker = Worker(kind.form, runtime, where.state_dir, where.bundle, stand_ins.reference)
            try:
                with ExitStack() as undo:
                    yield Host(kind, worker, where, undo)
                worker.end()
                worker.remove_zygotes()
                assert runtime.list() == ()
            finally:
                worker.close()
            # Whatever held them has ended with its container.
            until(lambda: not marked(where.mark), "the end of what a task has started")

    yield a_host
    for parent in Path("/sys/fs/cgroup").glob(f"*/{NAMESPACE}"):
        parent.rmdir()


@pytest.fixture(scope="session")
def reports(hosts: Callable[[Kind], Any], secret: str, daemon_of: Callable[[str], Daemon]) -> Callable[[Kind], Report]:
    """What was seen from inside a container of a kind; each is visited once."""

    def visited(kind: Kind) -> Report:
        guarded = kind not in UNGUARDED
        name = f"ai-control-{secrets.token_hex(8)}"
        with (
            hosts(kind) as host,
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as abstract,
        ):
            abstract.bind(f"\0{name}")
            abstract.listen(8)
            told = {
                "pids": [os.getpid(), daemon_of(kind.backend).pid],
                "bundle": str(host.place.bundle),
                "sockets": [
                    str(daemon_of(kind.backend).socket),
                    "/run/containerd/containerd.sock",
                    "/var/run/docker.sock",
                    "/run/airflow-isolation/agent.sock",
                ],
                "control_sockets": [f"@{name}"],
                "port": server.getsockname()[1],
                "secret": secret,
                "mark": host.place.mark,
                "set_id_program": "/opt/shows-its-uid",
                "fill": 8 * MIB,
                "most_forks": 60,
                # It would change what the next file of a parse container finds, and so end that.
                "without": ["slow down all processes of its user"] if kind.start == "parse" else [],
            }
            before = host.place.files_of_bundle()
            if guarded:
                report = visit(host, told)
            else:
                planted = {"PLANTED": os.environ["OF_NOBODY"], "AIRFLOW_CONN_PLANTED": "x"}
                report = Report(host.start(program("attempts", told), environment=planted).json())
            assert host.place.files_of_bundle() == before
            return report

    done: dict[Kind, Report | Exception] = {}

    def once(kind: Kind) -> Report:
        if kind not in done:
            try:
                done[kind] = visited(kind)
            except Exception as error:  # noqa: BLE001 - raised below, to each who asks
                done[kind] = error
        found = done[kind]
        if isinstance(found, Exception):
            raise found
        return found

    return once
