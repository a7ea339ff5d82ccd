"""Packets between worker and node: both sides read a stranger's bytes."""

from __future__ import annotations

import json
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_isolation.container_spec import Mount
from airflow_isolation.errors import (
    ContainerKilled,
    HostTrouble,
    ImageNotFound,
    IsolationError,
    PolicyRefused,
    SettingError,
)
from airflow_isolation.node.clients import Client, is_allowed
from airflow_isolation.node.protocol import HungUp, Malformed, error_of, receive, send, told
from airflow_isolation.node.request import StartRequest
from airflow_isolation.runtime import labels

if TYPE_CHECKING:
    from collections.abc import Iterator

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
REQUEST = StartRequest(
    backend="containerd",
    airflow="3.3.2",
    dag_id="sales",
    task_id="load",
    executor_config={"container": {"image": "i:1"}},
    labels={labels.DAG_ID: "sales"},
    forwarded={"AIRFLOW_HOME": "/tmp"},
    own={"A": "b"},
    mounts=(Mount(target="/root", kind="tmpfs", size=1024, mode=0o755), Mount(source="/dags", target="/dags")),
    shared_mounts=(Mount(source="/config", target="/config"),),
    settings_digest="abc",
    pull_timeout=5,
)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def test_a_request_is_what_it_was_but_for_the_sources() -> None:
    said = json.loads(json.dumps(REQUEST.as_message()))
    again = StartRequest.of_message(said)
    assert again.as_message() == REQUEST.as_message()
    assert [mount.target for mount in again.binds] == ["/dags", "/config"]
    assert not any(mount.source for mount in again.binds), "the sources come as descriptors"


@given(st.dictionaries(st.sampled_from(sorted(REQUEST.as_message())), JSON))
def test_a_request_of_anything_is_one_or_malformed(changed: dict[str, Any]) -> None:
    said = {**REQUEST.as_message(), **changed}
    try:
        request = StartRequest.of_message(said)
    except Malformed:
        return
    assert all(mount.target.startswith("/") and ".." not in mount.target.split("/") for mount in request.binds)
    assert labels.OWNER not in request.labels


@given(st.binary(max_size=200))
def test_a_packet_of_any_bytes_is_an_object_or_malformed(data: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.send(data)
        try:
            packet = receive(ours)
        except (Malformed, HungUp):
            return
        assert isinstance(packet.message, dict)


def test_descriptors_come_along_and_are_closed(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    reading, writing = os.pipe()
    send(ours, {"a": 1}, (writing,))
    os.close(writing)
    packet = receive(theirs)
    (descriptor,) = packet.descriptors
    assert not os.get_inheritable(descriptor)
    packet.close()
    assert os.read(reading, 1) == b"", "nobody has the other end any more"
    os.close(reading)


def test_descriptors_of_a_malformed_packet_are_closed(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    reading, writing = os.pipe()
    socket.send_fds(ours, [b"no json"], [writing])
    os.close(writing)
    with pytest.raises(Malformed):
        receive(theirs)
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_a_peer_that_does_not_read_is_not_waited_for(pair: tuple[socket.socket, socket.socket]) -> None:
    def flood() -> None:
        for _ in range(100_000):
            send(pair[0], {"x": "y" * 1000})

    with pytest.raises(HungUp):
        flood()


def test_a_message_that_is_too_large_is_refused_before_it_is_sent(pair: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(Malformed, match="more than"):
        send(pair[0], {"x": "y" * 1_000_000})


@pytest.mark.parametrize(
    "error",
    [
        IsolationError("a", hint="b"),
        SettingError("a", source="sales.yaml", line=3, key="container.image", hint="b"),
        PolicyRefused("a", source="executor_config", key="image"),
        ImageNotFound("a"),
        HostTrouble("a", hint="b"),
        ContainerKilled("a"),
    ],
)
def test_an_error_arrives_as_itself(error: IsolationError) -> None:
    again = error_of(json.loads(json.dumps(told(error))))
    assert type(again) is type(error)
    assert str(again) == str(error)


def test_an_error_of_another_module_arrives_as_what_the_worker_knows() -> None:
    assert type(error_of(told(Malformed("a")))) is IsolationError


@pytest.mark.parametrize("said", [None, [], {}, {"kind": "IsolationError"}, {"kind": "annotations"}, {"kind": 7}])
def test_an_error_that_makes_no_sense_is_one_all_the_same(said: object) -> None:
    assert isinstance(error_of(said), IsolationError)


@pytest.mark.parametrize(
    ("entry", "allowed"),
    [("5000", True), ("5001", False), ("@7000", True), ("@5000", False), ("no-such-user", False), ("@no-such", False)],
)
def test_who_is_allowed(entry: str, allowed: bool) -> None:
    client = Client(uid=5000, groups=frozenset({6000, 7000}), pid=1)
    assert is_allowed(client, [entry]) is allowed


def test_root_is_allowed_always_and_a_name_is_looked_up() -> None:
    assert is_allowed(Client(uid=0, groups=frozenset(), pid=1), [])
    assert is_allowed(Client(uid=1, groups=frozenset(), pid=1), ["daemon"])


def test_the_last_word_of_a_peer_that_has_left_something_unread_is_heard() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        send(ours, {"unread": 1})
        send(theirs, {"last": 1})
        theirs.close()
        assert receive(ours).message == {"last": 1}
        with pytest.raises(HungUp):
            receive(ours)
