"""The agent as process 1 of a pid namespace, against a stand-in for Airflow's entry point that runs what it is told.

The stand-in saves the seconds that importing Airflow takes; tests/end_to_end runs the agent with the real one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from airflow_isolation import agent
from airflow_isolation.bridge.agent_socket import AgentConnection, AgentListener, EndedBeforeHello, Hello

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airflow_isolation.runtime.interface import ExitStatus

STAND_IN = """
import os, sys
def _subprocess_main(): pass
def _fork_main(requests, stdout, stderr, logs, target):
    exec(os.environ["BODY"], {**globals(), "requests": requests})
    sys.stdout.flush()
    os._exit(0)
"""


class NeverEnds:
    """A container that is not known to have ended."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()

    def fileno(self) -> int:
        return self._reader

    def result(self, timeout: float | None = None) -> ExitStatus:
        raise TimeoutError

    def close(self) -> None:
        for end in (self._reader, self._writer):
            os.close(end)

    def end(self) -> None:
        os.write(self._writer, b"!")


class RunningAgent:
    def __init__(self, directory: Path, **image: str) -> None:
        agent.copy_to(directory)
        package = directory / "lib" / "airflow" / "sdk" / "execution_time"
        package.mkdir(parents=True)
        for parent in (package, package.parent, package.parent.parent):
            (parent / "__init__.py").touch()  # a namespace package would lose to an installed Airflow
        (package / "supervisor.py").write_text(STAND_IN)
        for distribution in ("apache_airflow_core-3.3.99", "apache_airflow_task_sdk-1.3.99"):
            (directory / "lib" / f"{distribution}.dist-info").mkdir()
        self.listener = AgentListener(directory)
        self.ended = NeverEnds()
        # --kill-child: an agent that hangs dies with the test.
        command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.process = subprocess.Popen(
            [*command, sys.executable, str(directory / agent.AGENT_NAME)],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(directory / "lib"), **image},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.pairs = [socket.socketpair() for _ in range(4)]
        for ours, _ in self.pairs:
            ours.settimeout(20)

    def agent_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if pids := children.read_text().split():
                return int(pids[0])
            time.sleep(0.01)
        raise AssertionError("unshare did not start the agent")

    def connect(self) -> tuple[AgentConnection, Hello]:
        return self.listener.accept(pid=self.agent_pid(), ended=self.ended, timeout=20)  # type: ignore[arg-type]

    def start(self, body: str, *, grace: float = 5.0, **environment: str) -> AgentConnection:
        connection, _ = self.connect()
        connection.start(
            purpose="task",
            environment={"BODY": body, **environment},
            grace=grace,
            descriptors=[theirs for _, theirs in self.pairs],
        )
        for _, theirs in self.pairs:
            theirs.close()
        return connection

    def read(self, channel: int) -> bytes:
        """Everything the workload writes on a channel, to its end."""
        received = b""
        while chunk := self.pairs[channel][0].recv(65536):
            received += chunk
        return received

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()
        self.listener.close()
        self.ended.close()
        for pair in self.pairs:
            for end in pair:
                end.close()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[RunningAgent]:
    started = RunningAgent(tmp_path)
    yield started
    started.close()


@pytest.fixture(autouse=True)
def _no_connection_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    made: list[AgentConnection] = []
    initialise = AgentConnection.__init__

    def remember(self: AgentConnection, peer: socket.socket) -> None:
        initialise(self, peer)
        made.append(self)

    monkeypatch.setattr(AgentConnection, "__init__", remember)
    yield
    for connection in made:
        connection.close()


def exited(connection: AgentConnection) -> int | None:
    connection._socket.settimeout(20)
    code = connection.exited()
    connection.cut()
    return code


def test_hello_names_the_versions_without_importing_them(running: RunningAgent) -> None:
    connection, hello = running.connect()
    assert hello == Hello(agent.VERSION, ".".join(map(str, sys.version_info[:3])), "3.3.99", "1.3.99")
    connection.close()


def test_descriptors_environment_and_exit_code_arrive(running: RunningAgent) -> None:
    connection = running.start(
        "print(os.environ['TOLD']); os.write(2, b'err'); os.write(3, b'log'); requests.send(b'req');"
        " sys.stdout.flush(); os._exit(7)",
        TOLD="text with ü and spaces",
    )
    assert running.read(1) == "text with ü and spaces\n".encode()
    assert (running.read(2), running.read(3), running.read(0)) == (b"err", b"log", b"req")
    assert exited(connection) == 7
    assert running.process.wait(20) == 7
    connection.close()


@pytest.mark.parametrize("safe_path", ["", "1"])
def test_an_image_may_keep_a_programs_directory_out_of_the_path(tmp_path: Path, safe_path: str) -> None:
    running = RunningAgent(tmp_path, PYTHONSAFEPATH=safe_path)
    try:
        connection = running.start("print(*sys.path, sep='\\n')")
        path = running.read(1).decode().splitlines()
        assert path[0] == str(tmp_path / "lib")
        assert str(tmp_path) not in path
        assert exited(connection) == 0
    finally:
        running.close()


def test_the_workload_has_no_descriptor_but_its_four(running: RunningAgent) -> None:
    connection = running.start("print(sorted(os.listdir('/proc/self/fd')))")
    # The fifth is the listing itself.
    assert running.read(1) == b"['0', '1', '2', '3', '4']\n"
    connection.close()


def test_a_signal_that_kills_is_reported_as_such(running: RunningAgent) -> None:
    connection = running.start("os.kill(os.getpid(), 9)")
    assert exited(connection) == -9
    assert running.process.wait(20) == 128 + 9
    connection.close()


def test_the_agent_stays_until_the_worker_has_heard_the_end(running: RunningAgent) -> None:
    connection = running.start("os._exit(3)")
    connection._socket.settimeout(20)
    assert connection.exited() == 3
    with pytest.raises(subprocess.TimeoutExpired):
        running.process.wait(0.5)
    connection.send_signal(signal.SIGTERM)  # comes too late, and harms nobody
    with pytest.raises(subprocess.TimeoutExpired):
        running.process.wait(0.2)
    connection.cut()
    assert running.process.wait(20) == 3


def test_a_segfault_ends_the_workload_although_python_handles_it(running: RunningAgent) -> None:
    connection = running.start(
        "import signal, ctypes; signal.signal(signal.SIGSEGV, lambda *_: None); ctypes.string_at(0)"
    )
    assert exited(connection) == -signal.SIGSEGV
    connection.close()


def test_signals_reach_the_whole_group(running: RunningAgent) -> None:
    connection = running.start(
        "import subprocess, signal;"
        "child = subprocess.Popen(['sh', '-c', 'trap \"echo child; exit\" TERM; echo ready; while :; do sleep 0.05; done']);"
        "signal.signal(signal.SIGTERM, lambda *_: (child.wait(), os._exit(5)));"
        "os.write(1, b'handled\\n');"
        "[signal.pause() for _ in range(300)]"
    )
    said = b""
    while sorted(said.split()) != [b"handled", b"ready"]:
        said += running.pairs[1][0].recv(100)
    assert connection.send_signal(signal.SIGTERM)
    assert running.read(1) == b"child\n"
    assert exited(connection) == 5
    connection.close()


def test_grandchildren_and_orphans_are_gone_at_the_end(running: RunningAgent) -> None:
    connection = running.start(
        "import subprocess;"
        "subprocess.Popen(['setsid', 'sh', '-c', 'sleep 300 & sleep 300'], start_new_session=True);"
        "print('started')"
    )
    # End of file comes although the grandchildren hold the channel: they are killed.
    assert running.read(1) == b"started\n"
    assert exited(connection) == 0
    assert running.process.wait(20) == 0
    connection.close()


def test_a_workload_that_makes_orphans_without_end_does_not_outlive_its_worker(running: RunningAgent) -> None:
    """Each of their ends is a signal to process 1, and one more to collect."""
    connection = running.start(
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('begins', flush=True)\n"
        "while True:\n"
        "    if os.fork() == 0:\n"
        "        if os.fork() == 0: os._exit(0)\n"
        "        os._exit(0)\n"
        "    os.waitpid(-1, os.WNOHANG)",
        grace=0.2,
    )
    assert running.pairs[1][0].recv(100) == b"begins\n"
    connection.close()
    assert running.process.wait(60) == 128 + 9


def test_the_workload_does_not_outlive_its_worker(running: RunningAgent) -> None:
    connection = running.start(
        "import os, signal, time; signal.signal(signal.SIGTERM, lambda *_: os.write(1, b'asked\\n'));"
        "os.write(1, b'up\\n'); [time.sleep(1) for _ in range(300)]",
        grace=2.0,
    )
    assert running.pairs[1][0].recv(100) == b"up\n"
    connection.close()
    assert running.read(1) == b"asked\n"
    assert running.process.wait(20) == 128 + 9


def test_an_agent_without_a_worker_ends_at_once(running: RunningAgent) -> None:
    connection, _ = running.connect()
    connection.close()
    assert running.process.wait(20) == 0


def test_a_stranger_on_the_socket_is_turned_away(running: RunningAgent, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(str(tmp_path / agent.SOCKET_NAME))
        stranger.send(json.dumps({"hello": {"agent": 1, "python": "3", "airflow": "3.3.2", "task_sdk": None}}).encode())
        connection, hello = running.connect()
        assert hello.python != "3"
        connection.close()


def test_a_container_that_ends_first_is_not_waited_for(running: RunningAgent) -> None:
    pid = running.agent_pid()
    running.process.kill()
    running.process.wait()
    running.ended.end()
    # The agent may have said hello before its end; that is taken first.
    with pytest.raises(EndedBeforeHello):  # noqa: PT012
        for _ in range(2):
            running.listener.accept(pid=pid, ended=running.ended, timeout=20)  # type: ignore[arg-type]


@pytest.mark.parametrize("said", [b"not json", b"[]", b'{"hello": {"agent": "1"}}', b"\xff" * 100])
def test_a_peer_that_does_not_speak_the_protocol_is_refused(tmp_path: Path, said: bytes) -> None:
    from airflow_isolation.errors import ContainerFailed

    listener, ended = AgentListener(tmp_path), NeverEnds()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.connect(str(tmp_path / agent.SOCKET_NAME))
        peer.send(said)
        with pytest.raises(ContainerFailed):
            listener.accept(pid=os.getpid(), ended=ended, timeout=20)  # type: ignore[arg-type]
    listener.close()
    ended.close()


@pytest.mark.parametrize("said", [{"exited": {"code": 300}}, {"exited": {"signal": 0}}, {"exited": "yes"}, {}, [1]])
def test_an_end_that_makes_no_sense_is_left_to_the_runtime(said: Any) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        theirs.send(json.dumps(said).encode())
        connection = AgentConnection(ours)
        assert connection.exited() is None
        connection.close()
