"""What is sent to a child waits for the child, never for the loop."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest

from airflow_isolation.bridge.channels import PeerViolation
from airflow_isolation.integration.seams import parse_process
from airflow_isolation.integration.seams.parse_process import Wakeups, _Outbox

if TYPE_CHECKING:
    from collections.abc import Iterator


class Loop:
    """A channel to a child, and a selector as the DAG processor's loop serves it."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.ours, self.child = socket.socketpair()
        self.ours.setblocking(False)
        self.child.settimeout(5)
        self.wakeups = Wakeups()
        self.selector.register(self.wakeups, selectors.EVENT_READ, (self.wakeups.run, None))
        self.outbox = _Outbox(self.ours, self.selector, self.wakeups)

    def turn(self) -> int:
        events = self.selector.select(0.2)
        for key, _ in events:
            key.data[0](key.fileobj)
        return len(events)

    def close(self) -> None:
        self.outbox.close()
        self.wakeups.close()
        self.selector.close()
        self.ours.close()
        self.child.close()


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


def test_what_a_child_reads_at_once_is_sent_at_once(loop: Loop) -> None:
    loop.outbox.sendall(b"answer")
    assert loop.child.recv(100) == b"answer"
    assert loop.turn() == 0


def test_what_a_child_does_not_read_waits_and_arrives_whole(loop: Loop) -> None:
    data = bytes(range(256)) * 20_000
    loop.outbox.sendall(data)
    got = bytearray()
    while len(got) < len(data):
        loop.turn()
        got += loop.child.recv(1 << 20)
    assert got == data
    assert loop.turn() == 0


def test_an_answer_of_a_thread_is_sent_by_the_loop(loop: Loop) -> None:
    thread = threading.Thread(target=loop.outbox.sendall, args=(b"answer",))
    thread.start()
    thread.join()
    loop.turn()
    assert loop.child.recv(100) == b"answer"


def test_a_child_that_reads_nothing_is_not_written_to_for_ever(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parse_process, "OUTBOX_LIMIT", 1 << 20)
    loop.outbox.sendall(bytes(1 << 20))
    with pytest.raises(PeerViolation, match="unread"):
        loop.outbox.sendall(bytes(1 << 20))


def test_a_child_that_is_gone_is_no_error(loop: Loop) -> None:
    loop.child.close()
    loop.outbox.sendall(b"answer" * 1000)
    loop.turn()


def test_an_answer_after_the_end_goes_nowhere(loop: Loop) -> None:
    loop.outbox.sendall(bytes(1 << 20))
    loop.outbox.close()
    loop.outbox.close()
    loop.outbox.sendall(b"late")
    loop.wakeups.call(loop.outbox.flush)
    loop.turn()
    assert loop.selector.get_map().keys() == {loop.wakeups.fileno()}


def test_every_thread_wakes_the_loop_up(loop: Loop) -> None:
    done: list[int] = []
    threads = [threading.Thread(target=loop.wakeups.call, args=(lambda n=n: done.append(n),)) for n in range(50)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while len(done) < 50 and time.monotonic() < deadline:
        loop.turn()
    for thread in threads:
        thread.join()
    assert sorted(done) == list(range(50))
