"""What a hostile peer can write, and what the readers make of it."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_isolation.bridge.channels import FrameReader, LineAllowance, LineReader, PeerViolation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    yield ours, theirs
    ours.close()
    theirs.close()


def drain(reader: Callable[[socket.socket], bool], source: socket.socket) -> bool:
    """Call the reader until there is nothing more; True while the channel is open."""
    try:
        while reader(source):
            pass
    except BlockingIOError:
        return True
    return False


def test_frames_arrive_whole_however_they_are_cut(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    got: list[bytes] = []
    reader = FrameReader(lambda body: got.append(bytes(body)))
    for byte in b"\0\0\0\2hi\0\0\0\5there":
        theirs.send(bytes([byte]))
        assert drain(reader, ours)
    assert got == [b"hi", b"there"]


@pytest.mark.parametrize("length", [0, 1025, 0xFFFFFFFF])
def test_a_frame_of_no_or_too_many_bytes_is_refused_by_its_header(
    pair: tuple[socket.socket, socket.socket], length: int
) -> None:
    ours, theirs = pair
    theirs.send(length.to_bytes(4, "big"))
    with pytest.raises(PeerViolation, match=f"{length} bytes"):
        FrameReader(lambda _: None, limit=1024)(ours)


def test_a_promised_frame_takes_no_memory_before_it_comes(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.send((200 * 1024 * 1024).to_bytes(4, "big"))
    reader = FrameReader(lambda _: None)
    assert drain(reader, ours)
    assert len(reader._buffer) == 4


def test_a_small_frame_that_becomes_large_is_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    lists = b"\xdc" + (40_000).to_bytes(2, "big") + b"\x90" * 40_000
    theirs.send(len(lists).to_bytes(4, "big") + lists)
    delivered: list[bytes] = []
    with pytest.raises(PeerViolation, match="a frame of 40007 bytes"):
        drain(FrameReader(lambda body: delivered.append(bytes(body)), decoded_limit=1 << 20), ours)
    assert not delivered


def test_a_frame_may_take_many_times_its_length_as_long_as_that_is_little(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    lists = b"\xdc" + (40_000).to_bytes(2, "big") + b"\x90" * 40_000
    theirs.send(len(lists).to_bytes(4, "big") + lists)
    got: list[bytes] = []
    assert drain(FrameReader(lambda body: got.append(bytes(body))), ours)
    assert got == [lists]


@pytest.mark.parametrize(
    "value", [list(range(1_000_000)), "x" * 20_000_000, [{"id": n, "name": f"customer {n}"} for n in range(100_000)]]
)
def test_large_values_that_tasks_return_pass(value: object, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    body = msgspec.msgpack.encode(value)
    sender = threading.Thread(target=theirs.sendall, args=(len(body).to_bytes(4, "big") + body,))
    sender.start()
    got: list[object] = []
    ours.setblocking(True)
    reader = FrameReader(lambda frame: got.append(msgspec.msgpack.decode(frame)))
    while not got:
        reader(ours)
    sender.join()
    assert got == [value]


def test_an_endless_line_arrives_in_pieces(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    got: list[bytes] = []
    reader = LineReader(got.append, limit=100)
    for _ in range(10):
        theirs.send(b"x" * 64)
        assert drain(reader, ours)
        assert len(reader._buffer) <= 100
    theirs.close()
    assert not drain(reader, ours)
    assert b"".join(got) == b"x" * 640


@pytest.mark.parametrize("end", [b"\n", b""])
def test_an_endless_record_is_cut(pair: tuple[socket.socket, socket.socket], end: bytes) -> None:
    ours, theirs = pair
    got: list[bytes] = []
    cuts: list[tuple[bytes, int]] = []
    reader = LineReader(got.append, cut=lambda line, left_out: cuts.append((line, left_out)), limit=100)
    theirs.send(b"first\n")
    for _ in range(10):
        theirs.send(b"x" * 64)
        assert drain(reader, ours)
        assert len(reader._buffer) <= 100
    theirs.send(end)
    theirs.close()
    assert not drain(reader, ours)
    assert (got, cuts) == ([b"first"], [(b"x" * 100, 540)])


def test_lines_after_a_cut_one_are_whole(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    got: list[bytes] = []
    cuts: list[tuple[bytes, int]] = []
    reader = LineReader(got.append, cut=lambda line, left_out: cuts.append((line, left_out)), limit=10)
    theirs.send(b"x" * 25)
    assert drain(reader, ours)
    theirs.send(b"x" * 5 + b"\n" + b"0123456789\n" + b"01234567890\n" + b"last\n")
    assert drain(reader, ours)
    assert got == [b"0123456789", b"last"]
    assert cuts == [(b"x" * 10, 20), (b"0123456789", 1)]


def test_the_last_line_needs_no_newline(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    got: list[bytes] = []
    theirs.send(b"one\ntwo")
    theirs.close()
    assert not drain(LineReader(got.append), ours)
    assert got == [b"one", b"two"]


def test_all_channels_share_one_allowance_of_lines(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    got: list[bytes] = []
    spent: list[bool] = []
    allowance = LineAllowance(3, 1000, spent=lambda: spent.append(True))
    first, second = (LineReader(got.append, allowance=allowance) for _ in range(2))
    theirs.send(b"1\n2\n")
    assert drain(first, ours)
    theirs.send(b"3\n4\n5\n6 has no end yet")
    assert drain(second, ours)
    assert (got, spent) == ([b"1", b"2", b"3"], [True])
    theirs.send(b"7\n")
    assert drain(second, ours)  # it is still read: who writes need not wait
    theirs.close()
    assert not drain(second, ours)
    assert (got, spent, len(second._buffer)) == ([b"1", b"2", b"3"], [True], 0)


def test_an_allowance_is_of_bytes_too(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    got: list[bytes] = []
    reader = LineReader(got.append, allowance=LineAllowance(1000, 10, spent=lambda: None))
    theirs.send(b"eight888\n" + b"x" * 40)
    assert drain(reader, ours)
    theirs.close()
    assert not drain(reader, ours)
    assert got == [b"eight888"]


@given(st.lists(st.binary(max_size=40).filter(lambda line: b"\n" not in line)), st.integers(1, 60))
def test_of_each_line_what_is_left_out_is_counted(lines: list[bytes], step: int) -> None:
    got: list[tuple[bytes, int]] = []
    reader = LineReader(lambda line: got.append((line, 0)), cut=lambda *cut: got.append(cut), limit=10)
    stream = b"".join(line + b"\n" for line in lines)
    for start in range(0, len(stream), step):
        reader._take(stream[start : start + step])
    assert got == [(line[:10], max(0, len(line) - 10)) for line in lines]


@given(st.lists(st.binary(max_size=40).filter(lambda line: b"\n" not in line)), st.integers(1, 7))
def test_lines_come_back_as_they_were(lines: list[bytes], step: int) -> None:
    got: list[bytes] = []
    reader = LineReader(got.append)
    stream = b"".join(line + b"\n" for line in lines)
    for start in range(0, len(stream), step):
        reader._take(stream[start : start + step])
    assert got == lines
