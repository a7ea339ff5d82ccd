"""Descriptors go to a peer, which need not read."""

from __future__ import annotations

import os
import socket

import pytest

from airflow_isolation.bridge.descriptors import send_descriptors


def test_descriptors_arrive() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reading, writing = os.pipe()
    with ours, theirs:
        send_descriptors(ours, b"packet", [writing])
        packet, (descriptor,), _, _ = socket.recv_fds(theirs, 100, 1)
        os.write(descriptor, b"x")
        assert (packet, os.read(reading, 1)) == (b"packet", b"x")
    for number in (reading, writing, descriptor):
        os.close(number)


def test_a_peer_that_does_not_read_is_not_waited_for() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def flood() -> None:
        for _ in range(100_000):
            send_descriptors(ours, b"x" * 1000, [])

    with ours, theirs, pytest.raises(BlockingIOError):
        flood()
