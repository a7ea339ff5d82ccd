"""Clients that may not, that lie, that flood: each ends its own connection, and the node serves on."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.node.conftest import SECONDS, STRANGER
from tests.processes import wait_until
from tests.zygote.at_work import stand_ins

from airflow_isolation.bridge.pipe import open_channels
from airflow_isolation.node.protocol import MOST_DESCRIPTORS, PACKET_LIMIT, VERSION, receive
from airflow_isolation.node.request import StartRequest
from airflow_isolation.runtime import labels

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.node.conftest import House

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]

REQUEST = StartRequest(backend="containerd", airflow=stand_ins.AIRFLOW, dag_id="d", task_id="t").as_message()


@contextmanager
def connected(host: House) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(60)
        connection.connect(str(host.socket))
        yield connection


def answer(host: House, message: Any, descriptors: Sequence[int] = ()) -> dict[str, Any]:
    """What the node says to one packet, and that it then hangs up."""
    packet = message if isinstance(message, bytes) else json.dumps(message).encode()
    with connected(host) as connection:
        socket.send_fds(connection, [packet], list(descriptors))
        said = connection.recv(PACKET_LIMIT)
        assert connection.recv(1) == b"", "the node hangs up"
    found: dict[str, Any] = json.loads(said)["failed"]
    return found


@contextmanager
def descriptors(*more: str) -> Iterator[list[int]]:
    """Those of a request: channels, mount namespace, and directories."""
    ours, theirs = open_channels()
    opened = [os.open(path, os.O_RDONLY) for path in ("/proc/self/ns/mnt", *more)]
    try:
        yield [*(channel.fileno() for channel in theirs.in_order()), *opened]
    finally:
        for number in opened:
            os.close(number)
        ours.close()
        theirs.close()


def open_files(host: House) -> int:
    assert host.node is not None
    return len(list(Path(f"/proc/{host.node.pid}/fd").iterdir()))


def test_a_client_that_is_not_allowed(host: House) -> None:
    failed = host.refused(uid=STRANGER)
    assert f"The node does not serve uid {STRANGER}" in failed["failed"]
    assert "node_clients" in failed["failed"]


@pytest.mark.parametrize(
    ("packet", "why"),
    [
        (b"not json", "not JSON"),
        (b"[1]", "no JSON object"),
        (b"[" * 100_000, "not JSON"),
        ({"version": 99, "start": {}}, "speaks version 99"),
        ({"start": {}}, "speaks version None"),
        ({"version": VERSION}, "first packet must be"),
        ({"version": VERSION, "kill": {"signal": 9, "everyone": True}}, "first packet must be"),
        ({"version": VERSION, "start": []}, "no JSON object"),
        ({"version": VERSION, "start": {}}, "backend of a request"),
        ({"version": VERSION, "start": {**REQUEST, "labels": {labels.OWNER: "1:1@x"}}}, "not a worker's to give"),
        ({"version": VERSION, "start": {**REQUEST, "labels": {labels.DAG_ID: "x" * 5000}}}, "not a worker's to give"),
        ({"version": VERSION, "start": {**REQUEST, "mounts": [{"target": "/proc/x"}]}}, "no place for a mount"),
        ({"version": VERSION, "start": {**REQUEST, "mounts": [{"target": "/a/../b"}]}}, "no place for a mount"),
        ({"version": VERSION, "start": {**REQUEST, "mounts": [{"target": "/"}]}}, "no place for a mount"),
        ({"version": VERSION, "start": {**REQUEST, "mounts": [{"target": f"/{n}"} for n in range(9)]}}, "more than 8"),
        (
            {"version": VERSION, "start": {**REQUEST, "mounts": [{"target": "/t", "size": 2**40, "mode": 0}]}},
            "too large",
        ),
        ({"version": VERSION, "start": {**REQUEST, "own": {"A=B": "x"}}}, "something else than text"),
        ({"version": VERSION, "start": {**REQUEST, "pull_timeout": -1}}, "no number of seconds"),
        ({"version": VERSION, "resume": {"container": 7}}, "first packet must be"),
        ({"version": VERSION, "resume": {"container": "task-unknown"}}, "task-unknown"),
        ({"version": VERSION, "start": REQUEST}, "came with 0 descriptors, and 5 belong to it"),
    ],
)
def test_packets_that_make_no_sense(host: House, packet: Any, why: str) -> None:
    failed = answer(host, packet)
    assert why in failed["message"]


def test_a_packet_that_is_too_large(host: House) -> None:
    failed = answer(host, json.dumps({"version": VERSION, "x": "y" * PACKET_LIMIT}).encode()[: PACKET_LIMIT + 100])
    assert f"more than {PACKET_LIMIT} bytes" in failed["message"]


def test_too_many_descriptors(host: House) -> None:
    before = open_files(host)
    with descriptors() as found:
        many = [os.dup(found[0]) for _ in range(MOST_DESCRIPTORS + 100)]
        try:
            failed = answer(host, {"version": VERSION, "start": REQUEST}, many)
        finally:
            for number in many:
                os.close(number)
    assert f"more than {MOST_DESCRIPTORS} descriptors" in failed["message"]
    wait_until(lambda: open_files(host) <= before, SECONDS, "the node to keep nothing of it")


def test_descriptors_of_a_wrong_kind(host: House) -> None:
    mounted = {"version": VERSION, "start": {**REQUEST, "mounts": [{"target": "/srv/dags"}]}}
    with descriptors("/etc/hostname") as found:
        assert "something else than a directory" in answer(host, mounted, found)["message"]
    with descriptors(str(host.bundle)) as found:
        wrong = [found[4], *found[1:4], found[4], found[5]]
        assert "no channel" in answer(host, mounted, wrong)["message"]
    with descriptors(str(host.bundle)) as found:
        # A directory is no mount namespace.
        assert "mount namespace" in answer(host, mounted, [*found[:4], found[5], found[5]])["message"]
    with descriptors() as found:
        only_a_path = os.open(host.bundle, os.O_PATH)
        try:
            failed = answer(host, mounted, [*found, only_a_path])
        finally:
            os.close(only_a_path)
        assert "has not opened for reading" in failed["message"]


def test_a_document_that_is_a_file_of_the_host_is_not_read(host: House) -> None:
    with descriptors("/etc/hostname") as found:
        failed = answer(host, {"version": VERSION, "start": {**REQUEST, "has_document": True}}, found)
    assert "not in a memory file" in failed["message"]


def test_a_backend_that_the_node_does_not_have(host: House) -> None:
    failed = host.refused(backend="docker")
    assert failed["kind"] == "SettingError"
    assert "the node has containerd" in failed["failed"]


def test_a_directory_that_the_worker_may_not_read(host: House) -> None:
    closed = host.place / "closed"
    closed.mkdir(mode=0o700, exist_ok=True)
    failed = host.refused(bundle=str(closed))
    assert "can't read" in failed["failed"]


@pytest.mark.parametrize("bundle", ["/proc", "/dev", "/"])
def test_a_directory_of_the_kernel_s(host: House, bundle: str) -> None:
    """Also where it lies below the directory."""
    failed = host.refused(bundle=bundle, target="/srv/dags")
    assert "a file system of the kernel's own" in failed["failed"]


def test_the_policy_is_the_node_s(host: House) -> None:
    for written in (
        {"capabilities": ["NET_ADMIN"]},
        {"volumes": ["/etc:/mnt/etc"]},
        {"run_as_user": "0"},
        {"run_as_user": "root"},
    ):
        failed = host.refused(written=written)
        assert failed["kind"] == "PolicyRefused", failed


def test_the_resume_of_another_user_s_task(host: House) -> None:
    """Also root's: whose container it is, is in its labels."""
    worker = host.work("import time; time.sleep(600)", hold=True)
    id = worker.said()["id"]
    failed = answer(host, {"version": VERSION, "resume": {"container": id}})
    assert f"No task of uid 0 has the container {id}" in failed["message"]
    assert host.runtime.get(id).pid


def test_a_client_that_says_nothing_or_asks_twice(host: House) -> None:
    with connected(host) as silent:
        said = json.loads(silent.recv(PACKET_LIMIT))
        assert "nothing was asked for" in said["failed"]["message"]
    with connected(host) as hasty, descriptors() as found:
        for _ in range(2):
            socket.send_fds(hasty, [json.dumps({"version": VERSION, "start": REQUEST}).encode()], found)
        said = json.loads(hasty.recv(PACKET_LIMIT))
        assert "must wait for an answer" in said["failed"]["message"]


def test_of_a_client_that_listens_no_more_nothing_is_left(host: House) -> None:
    """The node learns of it when it tells the end of the task, as of a worker whose task ended before its own end was seen."""
    with connected(host) as deaf, descriptors() as found:
        socket.send_fds(deaf, [json.dumps({"version": VERSION, "start": REQUEST}).encode()], found)
        while "started" not in (packet := receive(deaf)).message:
            assert "busy" in packet.message, packet
        deaf.shutdown(socket.SHUT_RD)
        packet.close()  # the lifeline
        host.wait_until_nothing_is_left()


def test_a_node_without_descriptors_serves_when_it_has_some_again(host: House) -> None:
    assert host.node is not None
    limits = resource.prlimit(host.node.pid, resource.RLIMIT_NOFILE)
    assert limits[0] == limits[1], "it takes what it may have"
    resource.prlimit(host.node.pid, resource.RLIMIT_NOFILE, (open_files(host), limits[1]))
    try:
        with ExitStack() as held:

            def warned() -> bool:
                # What the node gives back meanwhile, or had not taken, lets one more in.
                held.enter_context(connected(host))
                return "No worker can connect now" in host.log

            wait_until(warned, SECONDS, "the node's warning")
    finally:
        resource.prlimit(host.node.pid, resource.RLIMIT_NOFILE, limits)
    host.run("pass")


def test_a_flood_of_connections_keeps_nobody_out(host: House) -> None:
    flood = []
    for _ in range(300):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(str(host.socket))
        with suppress(OSError):
            connection.send(b"{")
        flood.append(connection)
    try:
        _, ended = host.run("print('served')")
        assert ended["stdout"] == "served\n"
    finally:
        for connection in flood:
            connection.close()


UNSEEN = """
import socket, sys
from airflow_isolation.node.admission import Capacity
from airflow_isolation.node.clients import client_of
from airflow_isolation.node.service import Node

listener = socket.socket(fileno=int(sys.argv[1]))
connection, _ = listener.accept()
print(Node(None, clients=(), capacity=Capacity(), admission_timeout=1)._why_not(client_of(connection)))
"""


def test_a_worker_whose_process_the_node_does_not_see(tmp_path: Path) -> None:
    """It could not tell when that ends. Here the node is in a pid namespace of its own, where it sees nobody."""
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client,
    ):
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        client.connect(str(tmp_path / "socket"))
        said = subprocess.run(
            ["unshare", "--pid", "--fork", sys.executable, "-c", UNSEEN, str(listener.fileno())],
            pass_fds=(listener.fileno(),),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    assert "it must be in the host's pid namespace" in said.stdout, said.stderr
