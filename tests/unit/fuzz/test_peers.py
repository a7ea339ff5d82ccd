"""What containers and other processes say: whatever it is, an error of ours comes out, or nothing."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from typing import Any

from hypothesis import strategies as st
from tests.unit.fuzz.inputs import ANYTHING, ODD_TEXT, almost, damaged, fuzzed

from airflow_isolation.bridge.agent_socket import AgentConnection, EndedBeforeHello, end_of
from airflow_isolation.bridge.channels import FrameReader, LineReader, PeerViolation
from airflow_isolation.bridge.zygote import ZygoteUnavailable, _answer
from airflow_isolation.errors import ContainerFailed
from airflow_isolation.runtime.labels import Owner

HELLO = {"hello": {"agent": 2, "python": "3.11.2", "airflow": "3.3.2", "task_sdk": "1.3.2"}}
MESSAGES: tuple[Any, ...] = (HELLO, {"exited": {"code": 0}}, {"exited": {"signal": 9}}, {"adopted": 1}, {"failed": "x"})


@st.composite
def packets(draw: st.DrawFn) -> bytes:
    message = draw(st.sampled_from(MESSAGES))
    said = json.dumps(draw(almost(message) | ANYTHING)).encode()
    return draw(damaged(said))[:60_000]


@fuzzed(packets(), examples=150)
def test_a_message_of_the_agent(packet: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        connection = AgentConnection(ours)
        for ask in (lambda: connection.hello(5), connection.news, connection.exited):
            theirs.send(packet or b"\0")
            with suppress(ContainerFailed, EndedBeforeHello):
                ask()
        theirs.send(packet or b"\0")
        theirs.send(packet or b"\0")
        with suppress(ContainerFailed):
            connection.waiting(5)
        with suppress(ContainerFailed):
            connection.adopt(child=7, grace=1, timeout=5)


@fuzzed(packets())
def test_an_answer_of_the_zygote(packet: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        theirs.send(packet or b"\0")
        with suppress(ZygoteUnavailable):
            assert _answer(ours, "forked") > 0


@fuzzed(almost({"exited": {"code": 0}}) | almost({"exited": {"signal": 9}}))
def test_the_end_of_a_workload(message: Any) -> None:
    code = end_of(message) if isinstance(message, dict) else None
    assert code is None or -64 <= code <= 255


CHUNKS = st.lists(st.binary(min_size=1, max_size=50), max_size=8)


@fuzzed(CHUNKS)
def test_frames(chunks: list[bytes]) -> None:
    delivered: list[memoryview] = []
    reader = FrameReader(delivered.append, limit=64)
    ours, theirs = socket.socketpair()
    with ours, theirs, suppress(PeerViolation):
        for chunk in chunks:
            theirs.sendall(chunk)
            assert reader(ours)
        theirs.shutdown(socket.SHUT_WR)
        assert not reader(ours)
    assert all(0 < len(frame) <= 64 for frame in delivered)


@fuzzed(CHUNKS)
def test_lines(chunks: list[bytes]) -> None:
    delivered: list[bytes] = []
    reader = LineReader(delivered.append, limit=16)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for chunk in chunks:
            theirs.sendall(chunk)
            assert reader(ours)
        theirs.shutdown(socket.SHUT_WR)
        assert not reader(ours)
    assert b"".join(delivered) == b"".join(chunks).replace(b"\n", b"")
    assert all(len(line) <= 16 for line in delivered)


OWNER = "4711:123456789@worker.example"


@fuzzed(damaged(OWNER.encode()).map(lambda label: label.decode(errors="replace")) | st.text(max_size=20) | ODD_TEXT)
def test_an_owner_s_label(label: str) -> None:
    owner = Owner.parse(label)
    if owner is not None:
        assert Owner.parse(str(owner)) == owner
        owner.is_gone()
        Owner(socket.gethostname(), owner.pid, owner.started).is_gone()
