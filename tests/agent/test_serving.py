"""The agent as it serves files, process 1 of pid and IPC namespaces, with a stand-in for Airflow.

What needs a container, and what hostile files do, is in tests/parse_containers.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from tests.agent.test_agent import NeverEnds
from tests.parse_containers import images

from airflow_isolation import agent
from airflow_isolation.bridge.agent_socket import AgentConnection, AgentListener

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Serving:
    """An agent, and the worker's end of the conversation."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        agent.copy_to(directory)
        self.scratch = directory / "scratch"
        self.scratch.mkdir()
        self.listener = AgentListener(directory)
        self.ended = NeverEnds()
        self.files = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: AgentConnection | None = None

    def launch(self, program: str = "", **image: str) -> AgentConnection:
        """Up to the hello; ``program`` is at the top of the stand-in's ``import airflow``, and ``image`` the image's environment."""
        for path, text in images.files_of(program).items():
            file = self.directory / "lib" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        command = ["unshare", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        self.process = subprocess.Popen(
            [*command, sys.executable, str(self.directory / agent.AGENT_NAME)],
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(self.directory / "lib"), **image},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        peer, _ = self.listener._socket.accept()
        self.connection = AgentConnection(peer)
        self.connection.hello(20)
        return self.connection

    def serve(self, program: str = "", **environment: str) -> AgentConnection:
        connection = self.launch(program)
        connection.serve(environment=environment, scratch=[str(self.scratch)])
        return connection

    def said(self) -> Any:
        """The next message; None when the agent is gone."""
        assert self.connection is not None
        self.connection._socket.settimeout(30)
        return self.connection.news()

    def parse(self, program: str, **environment: str) -> socket.socket:
        """Hand a file over; gives our end of its stdout."""
        assert self.connection is not None
        self.files += 1
        file = self.directory / f"file_{self.files}.py"
        file.write_text(program)
        pairs = [socket.socketpair() for _ in range(4)]
        self.connection.parse(environment=environment, modules=(), descriptors=[theirs for _, theirs in pairs])
        body = f"FILE={file}=FILE".encode()
        pairs[0][0].sendall(len(body).to_bytes(4, "big") + body)
        for number, (ours, theirs) in enumerate(pairs):
            theirs.close()
            if number != 1:
                ours.close()
        pairs[1][0].settimeout(30)
        return pairs[1][0]

    def end(self) -> bytes:
        """What it printed up to its end."""
        assert self.process is not None
        return self.process.communicate(timeout=30)[0]

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout
            self.process.stdout.close()
        self.listener.close()
        self.ended.close()


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    made = Serving(tmp_path)
    yield made
    made.close()


def everything(channel: socket.socket) -> bytes:
    received = b""
    with channel:
        while chunk := channel.recv(65536):
            received += chunk
    return received


def test_files_are_served_one_after_the_other(serving: Serving) -> None:
    serving.serve("import os; os.environ['IMPORTED'] = os.environ['OF_ALL']", OF_ALL="yes")
    assert serving.said()["ready"]["memory"] > 0
    for number in (0, 7):
        show = f"import os, sys; print(os.environ['IMPORTED'], os.environ.get('MINE')); sys.exit({number})"
        stdout = serving.parse(show, **({"MINE": "told"} if number else {}))
        assert everything(stdout) == (b"yes told\n" if number else b"yes None\n")
        assert serving.said() == {"started": {}}
        exited = serving.said()["exited"]
        assert (exited["code"], exited["memory"] > 0) == (number, True)


@pytest.mark.parametrize("safe_path", ["", "1"])
def test_an_image_may_keep_a_programs_directory_out_of_the_path(serving: Serving, safe_path: str) -> None:
    serving.launch(PYTHONSAFEPATH=safe_path).serve(environment={}, scratch=[])
    assert "ready" in serving.said()
    path = everything(serving.parse("import sys; print(*sys.path, sep='\\n')")).decode().splitlines()
    # Nor is anything missing that was there, or of the agent's there.
    assert path[0] == str(serving.directory / "lib")
    assert str(serving.directory) not in path


def test_what_is_in_the_scratch_directory_before_stays_and_what_comes_goes(serving: Serving) -> None:
    (serving.scratch / "from the image").mkdir()
    (serving.scratch / "from the image" / "file").touch()
    serving.scratch.joinpath("from the image").chmod(0o555)
    serving.serve()
    serving.said()
    everything(serving.parse(f"import os; os.makedirs('{serving.scratch}/from the image/a/b')"))
    assert [*serving.said(), *serving.said()] == ["started", "exited"]
    # As root even what came with the image goes, before the first file.
    assert list(serving.scratch.iterdir()) == []


def test_a_signal_ends_everybody_but_process_1(serving: Serving) -> None:
    serving.serve()
    serving.said()
    stdout = serving.parse(
        "import os, time; os.fork(); os.setsid() if os.getppid() > 1 else 0; print('up', flush=True); time.sleep(600)"
    )
    assert stdout.recv(10).startswith(b"up")
    assert serving.connection
    serving.connection.send_signal(9)  # type: ignore[arg-type]
    everything(stdout)
    assert serving.said() == {"started": {}}
    assert serving.said()["exited"]["signal"] == 9


@pytest.mark.parametrize("when", ["idle", "parsing"])
def test_it_ends_with_its_worker(serving: Serving, when: str) -> None:
    connection = serving.serve()
    serving.said()
    if when == "parsing":
        stdout = serving.parse("import time; print('up', flush=True); time.sleep(600)")
        assert stdout.recv(10) == b"up\n"
        connection.close()
        assert everything(stdout) == b""
    connection.close()
    assert serving.end() == b""


def test_it_ends_with_its_worker_while_the_import_hangs(serving: Serving) -> None:
    connection = serving.serve("import time; print('importing', flush=True); time.sleep(600)")
    assert serving.process
    assert serving.process.stdout
    assert serving.process.stdout.readline() == b"importing\n"
    connection.close()
    assert serving.end() == b""


def test_an_import_that_fails_is_told_and_its_traceback_printed(serving: Serving) -> None:
    serving.serve("raise KeyError('broken')")
    assert serving.said() == {"unable": {"why": "image can't import Airflow: KeyError('broken')"}}
    assert serving.said() is None
    lines = serving.end().decode().splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "KeyError: 'broken'"


def test_threads_that_the_import_leaves_are_refused(serving: Serving) -> None:
    serving.serve(images.STAND_INS["threaded"])
    assert serving.said() == {"unable": {"why": "importing Airflow left 2 threads running, which can't be forked"}}
    assert serving.end() == b""


def test_a_second_file_at_the_same_time_ends_it(serving: Serving) -> None:
    serving.serve()
    serving.said()
    first = serving.parse("import time; time.sleep(600)")
    second = serving.parse("print('second')")
    assert serving.said() == {"started": {}}
    assert serving.said() is None
    assert (everything(first), everything(second)) == (b"", b"")


def test_a_module_that_leaves_a_thread_lets_the_file_be_its_last(serving: Serving) -> None:
    serving.launch()
    module = serving.directory / "lib" / "airflow" / "threaded.py"
    module.write_text(images.STAND_INS["threaded"])
    assert serving.connection
    serving.connection.serve(environment={}, scratch=())
    serving.said()
    pairs = [socket.socketpair() for _ in range(4)]
    serving.connection.parse(
        environment={}, modules=["airflow.threaded", "airflow.not_there"], descriptors=[theirs for _, theirs in pairs]
    )
    for pair in pairs:
        for end in pair:
            end.close()
    assert serving.said() == {"started": {}}
    assert "exited" in serving.said()
    assert serving.said() is None


def test_what_it_says_after_ready_reaches_nobody(serving: Serving) -> None:
    """User code must not fill the host's disk by the output of process 1."""
    serving.serve("print('imported', flush=True)")
    serving.said()
    everything(serving.parse("import os; print(os.readlink('/proc/self/fd/0')[:6])"))
    serving.said(), serving.said()
    assert serving.connection
    serving.connection.close()
    assert serving.end() == b"imported\n"
