"""A real node on a real daemon, and workers that are ordinary users, or in namespaces of their own."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.airflow_home import own_cgroup_parent, short_directory
from tests.end_to_end.ordinary_user import as_ordinary_user
from tests.processes import wait_until
from tests.zygote.at_work import stand_ins

from airflow_isolation.node.trees import left_trees
from airflow_isolation.runtime import labels
from airflow_isolation.runtime.connect import connect

if TYPE_CHECKING:
    import socket as sockets
    from collections.abc import Iterator, Sequence

    from tests.conftest import Daemon, ImageArchive

    from airflow_isolation.runtime.interface import ContainerRuntime

HERE = Path(__file__).parent
#: Of nobody on the host.
UID = 61_234
STRANGER = 61_235
FIRST_UID = 1_600_000_000
SECONDS = 90


@dataclass
class Worker:
    """A worker's process; ``said`` is what it printed last."""

    process: subprocess.Popen[str]

    def said(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.errors()
        found: dict[str, Any] = json.loads(line)
        return found

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def errors(self) -> str:
        self.process.kill()
        return self.process.communicate()[1]


@dataclass
class House:
    """A host: daemon, node, and who works there."""

    backend: str
    daemon: Daemon
    runtime: ContainerRuntime
    place: Path
    cgroup_parent: str
    node: subprocess.Popen[str] | None = None
    workers: list[Worker] = field(default_factory=list)

    @property
    def state_dir(self) -> Path:
        return self.place / "s"

    @property
    def socket(self) -> Path:
        return self.place / "node" / "node.sock"

    @property
    def bundle(self) -> Path:
        return self.place / "dags"

    def configuration(self, more: str = "", settings: str = "") -> str:
        return f"""
[container_runtime]
image = {stand_ins.reference("good")}
image_pull_policy = never
network = none
uid_range = {FIRST_UID}:{64 * 65536}
state_dir = {self.state_dir}
cgroup_parent = {self.cgroup_parent}
node = {self.socket}
node_clients = {UID}
stop_grace_period = 2
{settings}
[{self.backend}_runtime]
socket_path = {self.daemon.socket}
[container_runtime_policy]
{more}
"""

    def start_node(
        self, more: str = "", *, settings: str = "", inherited: sockets.socket | None = None, **environment: str
    ) -> None:
        """With ``more`` lines of policy, and of ``settings``.

        :param inherited: a socket that it gets as systemd would hand it over.
        """
        command = [sys.executable, str(HERE / "node.py"), self.backend]
        if inherited is not None:
            handed = f'exec 3<&{inherited.fileno()}; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"'
            command = ["bash", "-ec", handed, "bash", *command]
        output_file = self.place / "node.out"
        output_file.write_text("")
        with output_file.open("ab") as output:
            self.node = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                text=True,
                env={**os.environ, "PYTHONPATH": str(HERE.parent.parent), **environment},
                pass_fds=() if inherited is None else (inherited.fileno(),),
            )
        assert self.node.stdin is not None
        self.node.stdin.write(self.configuration(more, settings))
        self.node.stdin.close()
        wait_until(lambda: "The node serves" in self.log or self.node_is_gone(), SECONDS, "the node")
        assert not self.node_is_gone(), self.log

    def node_is_gone(self) -> bool:
        return self.node is None or self.node.poll() is not None

    @property
    def log(self) -> str:
        return (self.place / "node.out").read_text(errors="replace")

    def kill_node(self) -> None:
        assert self.node is not None
        self.node.kill()
        self.node.wait()

    def end_node(self) -> None:
        if self.node is not None:
            self.node.terminate()
            self.node.wait(SECONDS)
            self.node = None

    def work(self, program: str = "", *, uid: int = UID, inside: Sequence[str] = (), **asked: Any) -> Worker:
        """A worker with one task. ``inside``: a command that runs the rest of its command line, such as in a namespace."""
        request = {
            "node": str(self.socket),
            "bundle": str(self.bundle),
            "airflow": stand_ins.AIRFLOW,
            "backend": self.backend,
            "program": program,
            **asked,
        }
        worker = Worker(
            subprocess.Popen(
                [
                    *inside,
                    *(as_ordinary_user(uid, uid) if uid else ()),
                    sys.executable,
                    str(HERE / "worker.py"),
                    json.dumps(request),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={"PATH": os.environ["PATH"], "PYTHONPATH": str(HERE.parent.parent)},
            )
        )
        self.workers.append(worker)
        return worker

    def run(self, program: str = "", **asked: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """One task from its start to its end: what the worker said of both."""
        worker = self.work(program, **asked)
        started = worker.said()
        assert "failed" not in started, f"{started}\n{self.log}"
        ended = worker.said()
        worker.process.wait(SECONDS)
        return started, ended

    def refused(self, **asked: Any) -> dict[str, Any]:
        """What the worker says of a task that is not started."""
        return self.work(**asked).said()

    def end_workers(self) -> None:
        while self.workers:
            worker = self.workers.pop()
            worker.process.kill()
            worker.process.communicate()

    def left(self) -> dict[str, list[str]]:
        """What tasks could leave; spares and zygotes are the node's household."""
        # Of one list: a spare may be made at any moment.
        containers = self.runtime.list()
        household = {one.id for one in containers if one.labels[labels.PURPOSE] in {"zygote", "spare"}}
        cgroups = Path("/sys/fs/cgroup").glob(f"*/{self.cgroup_parent.strip('/')}/task-*")
        return {
            "containers": [one.id for one in containers if one.id not in household],
            "directories": [str(path) for path in self.state_dir.glob("workloads/*") if path.name not in household],
            "cgroups": [str(path) for path in cgroups if path.name not in household],
        }

    def wait_until_nothing_is_left(self) -> None:
        try:
            wait_until(lambda: not any(self.left().values()), SECONDS, "an empty host")
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.left()}\n{self.log}") from None


@contextmanager
def house(backend: str, daemon: Daemon, archive: Path) -> Iterator[House]:
    with ExitStack() as stack:
        place = stack.enter_context(short_directory("ai-node-"))
        place.chmod(0o755)
        parent = stack.enter_context(own_cgroup_parent("ai-node-"))
        for name in ("dags", "node"):
            (place / name).mkdir(mode=0o755)
        (place / "dags" / "sales.py").write_text("# a DAG\n")
        runtime = stack.enter_context(
            connect(backend, socket_path=str(daemon.socket), namespace="airflow", state_dir=place / "s")
        )
        runtime.import_image(stand_ins.stand_in(archive, place / "good.tar", "good"))
        found = House(backend, daemon, runtime, place, parent)
        stack.callback(_clean, found)
        yield found


def _clean(house: House) -> None:
    house.end_workers()
    killed = house.node_is_gone()
    house.end_node()
    if killed:
        left_trees(house.state_dir, daemon_pid=0)
    for container in house.runtime.list():
        house.runtime.remove(container.id)
    house.runtime.remove_unused_roots()
    assert not list((house.state_dir / "trees").glob("*")), "the node left directories of workers"


@pytest.fixture(scope="module")
def long_lived(private_containerd: Daemon, image_archive: ImageArchive) -> Iterator[House]:
    with house("containerd", private_containerd, image_archive("no-airflow")) as found:
        found.start_node()
        yield found


@pytest.fixture
def host(long_lived: House) -> Iterator[House]:
    """After a test nothing is left of its tasks, and the node lives."""
    yield long_lived
    long_lived.end_workers()
    long_lived.wait_until_nothing_is_left()
    assert not long_lived.node_is_gone(), long_lived.log


def in_namespaces(place: Path) -> list[str]:
    """Runs a command as a container would: pid, mount, network and user namespaces, and another root for ``place``."""
    script = f'mount -t tmpfs tmpfs /srv && mount --bind {shlex.quote(str(place))} /srv && exec "$@"'
    return [
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--net",
        "--mount-proc",
        "--propagation=private",
        "sh",
        "-ec",
        script,
        "sh",
    ]
