"""The channels of a workload: what it prints to can be opened by its path, and ends when the last writer has gone."""

from __future__ import annotations

import os
import select
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from airflow_isolation.bridge.pipe import Channels, PipeEnd, open_channels

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def sides() -> Iterator[tuple[Channels, Channels]]:
    made = open_channels()
    yield made
    for side in made:
        side.close()
        side.close()


def readable(channel: PipeEnd) -> bool:
    return bool(select.select([channel], (), (), 0)[0])


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_output_can_be_opened_by_its_path_by_any_user(sides: tuple[Channels, Channels], name: str) -> None:
    ours, theirs = (getattr(side, name) for side in sides)
    assert stat.S_IMODE(os.fstat(theirs.fileno()).st_mode) == 0o666
    Path(f"/proc/self/fd/{theirs.fileno()}").write_text("a line\n")
    assert ours.recv(100) == b"a line\n"


def test_an_end_is_heard_when_nobody_can_write_any_more(sides: tuple[Channels, Channels]) -> None:
    ours, theirs = sides[0].stdout, sides[1].stdout
    assert isinstance(ours, PipeEnd)
    ours.setblocking(False)
    assert not readable(ours)
    with pytest.raises(BlockingIOError):
        ours.recv(1)
    # What writes still waits for room.
    assert os.get_blocking(theirs.fileno())
    theirs.close()
    assert readable(ours)
    assert ours.recv(1) == b""


def test_what_is_closed_has_no_descriptor(sides: tuple[Channels, Channels]) -> None:
    end = sides[0].stdout
    end.close()
    assert end.fileno() == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        end.recv(1)


def test_a_side_is_in_the_agents_order_and_nothing_is_inherited(sides: tuple[Channels, Channels]) -> None:
    for side in sides:
        assert side.in_order() == (side.requests, side.stdout, side.stderr, side.logs)
        assert not any(os.get_inheritable(channel.fileno()) for channel in side.in_order())


#: Reads so many bytes of the socket at descriptor 0, then does the rest, and is killed.
READER = """
import os, signal, socket, sys
requests = socket.socket(fileno=0)
left = int(sys.argv[1])
while left:
    left -= len(requests.recv(left))
exec(sys.argv[2])
os.kill(os.getpid(), signal.SIGKILL)
"""
WORK = bytes(100_000)  # more than one of the kernel's pieces


def killed_after(sides: tuple[Channels, Channels], read: int, then: str = "", *, work: bytes = WORK) -> bool:
    """Whether work was never read of which a process has read so many bytes."""
    ours, theirs = sides
    with subprocess.Popen([sys.executable, "-c", READER, str(read), then], stdin=theirs.requests.fileno()) as reader:
        theirs.close()
        ours.requests.sendall(work)
        assert not ours.requests.was_never_read
        assert reader.wait() == -signal.SIGKILL
    # As a supervisor does: up to the end.
    try:
        while ours.requests.recv(100):
            pass
    except ConnectionResetError:
        pass
    return ours.requests.was_never_read


@pytest.mark.parametrize("read", [0, 1, 4, len(WORK) - 1])
def test_the_kernel_tells_that_work_was_not_read(sides: tuple[Channels, Channels], read: int) -> None:
    assert killed_after(sides, read)


def test_work_that_was_read_to_its_last_byte_may_have_begun(sides: tuple[Channels, Channels]) -> None:
    assert not killed_after(sides, len(WORK))


@pytest.mark.parametrize("asks", ["requests.send(b'x')", "requests.send(b'x' * 200)"])
def test_who_asks_and_does_not_read_the_answer_has_begun(sides: tuple[Channels, Channels], asks: str) -> None:
    ours, _ = sides
    assert not killed_after(sides, len(WORK) - 10, asks)
    with pytest.raises(BrokenPipeError):
        ours.requests.sendall(b"an answer")
    assert not ours.requests.was_never_read


def test_work_that_could_not_even_be_sent_was_not_read(sides: tuple[Channels, Channels]) -> None:
    ours, theirs = sides
    theirs.close()
    with pytest.raises(BrokenPipeError):
        ours.requests.sendall(WORK)
    assert ours.requests.was_never_read
    assert ours.requests.recv(1) == b""
    assert ours.requests.was_never_read


def test_work_that_is_too_large_to_be_sent_at_once_was_not_read(sides: tuple[Channels, Channels]) -> None:
    """Its reader dies while the rest of it waits for room."""
    ours, theirs = sides
    with subprocess.Popen([sys.executable, "-c", READER, "100000", ""], stdin=theirs.requests.fileno()) as reader:
        theirs.close()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            ours.requests.sendall(bytes(10_000_000))
        assert reader.wait() == -signal.SIGKILL
    assert ours.requests.was_never_read
