"""What is told when work can't be handed to an agent."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import pytest

from airflow_isolation.bridge.agent_socket import AgentConnection
from airflow_isolation.errors import ContainerFailed, ContainerKilled, HostTrouble

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def pair() -> Iterator[tuple[AgentConnection, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection = AgentConnection(ours)
    with theirs:
        yield connection, theirs
    connection.close()


def start(connection: AgentConnection, **environment: str) -> None:
    connection.start(purpose="task", environment=environment, grace=1, descriptors=())


def test_an_agent_that_is_gone_was_killed(pair: tuple[AgentConnection, socket.socket]) -> None:
    connection, agent = pair
    agent.close()
    with pytest.raises(ContainerKilled, match="which has ended") as failed:
        start(connection)
    assert "KB" not in str(failed.value)


def test_our_own_closed_end_is_no_large_packet_either(pair: tuple[AgentConnection, socket.socket]) -> None:
    pair[0].close()
    with pytest.raises(ContainerKilled):
        start(pair[0])


def test_only_a_large_packet_is_told_as_one(pair: tuple[AgentConnection, socket.socket]) -> None:
    with pytest.raises(ContainerFailed, match="too large") as failed:
        start(pair[0], LARGE="x" * 1_000_000)
    assert not isinstance(failed.value, HostTrouble)
    assert "must stay below 200 KB" in failed.value.hint


def test_a_process_one_that_ends_before_it_adopts_was_killed(pair: tuple[AgentConnection, socket.socket]) -> None:
    connection, agent = pair

    def end() -> None:
        agent.recv(1024)
        agent.close()

    ending = threading.Thread(target=end)
    ending.start()
    with pytest.raises(ContainerKilled, match="ended before it could adopt"):
        connection.adopt(child=2, grace=1, timeout=30)
    ending.join()
