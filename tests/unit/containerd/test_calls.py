"""Deadlines, headers, retries and errors, against a server that does what the test says."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from airflow_isolation.containerd.api import containers_pb2, content_pb2, leases_pb2
from airflow_isolation.containerd.api.containers_pb2_grpc import ContainersServicer, add_ContainersServicer_to_server
from airflow_isolation.containerd.api.content_pb2_grpc import ContentServicer, add_ContentServicer_to_server
from airflow_isolation.containerd.api.leases_pb2_grpc import LeasesServicer, add_LeasesServicer_to_server
from airflow_isolation.containerd.client import NO_DEADLINE, Client
from airflow_isolation.containerd.errors import (
    ClientClosed,
    DeadlineExceeded,
    NotASocket,
    NotFound,
    ResourceExhausted,
    SocketMissing,
    Unavailable,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

LIST = containers_pb2.ListContainersRequest()
CREATE = containers_pb2.CreateContainerRequest()


class FakeContainerd(ContainersServicer, ContentServicer, LeasesServicer):  # type: ignore[misc]
    """Fails as often as ``script`` has codes, then answers. For what no real daemon does on demand."""

    def __init__(self) -> None:
        self.script: list[grpc.StatusCode] = []
        self.calls: list[tuple[str, dict[str, str], float | None]] = []
        self.hang = threading.Event()
        self.hang.set()
        self.size = 0

    def _meet(self, name: str, context: Any) -> None:
        metadata = {key: value for key, value in context.invocation_metadata() if key.startswith("containerd-")}
        self.calls.append((name, metadata, context.time_remaining()))
        self.hang.wait(10)
        if self.script:
            context.abort(self.script.pop(0), "as the test says")

    def List(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._meet("List", context)
        return containers_pb2.ListContainersResponse(containers=[containers_pb2.Container(id="x" * self.size)])

    def Create(self, request: Any, context: Any) -> Any:  # noqa: N802
        if isinstance(request, leases_pb2.CreateRequest):
            return leases_pb2.CreateResponse(lease=leases_pb2.Lease(id=request.id))
        self._meet("Create", context)
        return containers_pb2.CreateContainerResponse()

    def Delete(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._meet("Delete", context)
        from google.protobuf.empty_pb2 import Empty

        return Empty()

    def Read(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._meet("Read", context)
        yield content_pb2.ReadContentResponse(data=b"one")
        yield content_pb2.ReadContentResponse(data=b"two")


@pytest.fixture
def directory() -> Iterator[Path]:
    # pytest's own is too long for a socket's address.
    with tempfile.TemporaryDirectory(prefix="calls-") as name:
        yield Path(name)


@pytest.fixture
def fake(directory: Path) -> Iterator[FakeContainerd]:
    fake = FakeContainerd()  # type: ignore[abstract]
    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool)
        add_ContainersServicer_to_server(fake, server)
        add_ContentServicer_to_server(fake, server)
        add_LeasesServicer_to_server(fake, server)
        server.add_insecure_port(f"unix:{directory}/socket")
        server.start()
        yield fake
        fake.hang.set()
        server.stop(0).wait(10)


@pytest.fixture
def client(fake: FakeContainerd, directory: Path) -> Iterator[Client]:
    with Client(directory / "socket", namespace="ours", timeout=20, retry_for=10) as client:
        yield client
    assert fake.calls


def names(fake: FakeContainerd) -> list[str]:
    return [name for name, _, _ in fake.calls]


def test_every_call_names_the_namespace_and_has_a_deadline(client: Client, fake: FakeContainerd) -> None:
    client.containers.List(LIST)

    ((_, metadata, remaining),) = fake.calls
    assert metadata == {"containerd-namespace": "ours"}
    assert remaining is not None
    assert 10 < remaining < 21


def test_call_s_own_deadline_counts(client: Client, fake: FakeContainerd) -> None:
    client.containers.List(LIST, timeout=5)
    client.containers.List(LIST, timeout=NO_DEADLINE)

    assert fake.calls[0][2] is not None
    assert fake.calls[0][2] < 10
    # gRPC's server tells "none" as a time far away.
    assert fake.calls[1][2] is None or fake.calls[1][2] > 1e6


def test_lease_s_header_is_on_the_leased_calls_only(client: Client, fake: FakeContainerd) -> None:
    with client.lease(expires=timedelta(hours=1), id="mine") as leased:
        leased.containers.List(LIST)
        client.containers.List(LIST)

    assert [metadata.get("containerd-lease") for _, metadata, _ in fake.calls[:2]] == ["mine", None]
    assert all(metadata["containerd-namespace"] == "ours" for _, metadata, _ in fake.calls)


def test_question_is_asked_again_while_the_daemon_is_unavailable(client: Client, fake: FakeContainerd) -> None:
    fake.script = [grpc.StatusCode.UNAVAILABLE] * 3
    client.containers.List(LIST)
    assert names(fake) == ["List"] * 4


def test_stream_s_question_is_asked_again_before_its_first_message(client: Client, fake: FakeContainerd) -> None:
    fake.script = [grpc.StatusCode.UNAVAILABLE] * 2
    parts = [part.data for part in client.content.Read(content_pb2.ReadContentRequest())]
    assert parts == [b"one", b"two"]
    assert names(fake) == ["Read"] * 3


def test_what_may_have_been_done_is_not_done_again(client: Client, fake: FakeContainerd) -> None:
    fake.script = [grpc.StatusCode.UNAVAILABLE]
    with pytest.raises(Unavailable, match=r"Containers\.Create: as the test says"):
        client.containers.Create(CREATE)
    assert names(fake) == ["Create"]


def test_other_errors_are_not_asked_again(client: Client, fake: FakeContainerd) -> None:
    fake.script = [grpc.StatusCode.NOT_FOUND]
    with pytest.raises(NotFound):
        client.containers.List(LIST)
    assert names(fake) == ["List"]


def test_patience_ends(fake: FakeContainerd, directory: Path) -> None:
    fake.script = [grpc.StatusCode.UNAVAILABLE] * 1000
    with Client(directory / "socket", retry_for=0) as client, pytest.raises(Unavailable):
        client.containers.List(LIST)
    assert names(fake) == ["List"]


def test_future_that_has_failed_already_is_a_future_all_the_same(client: Client, fake: FakeContainerd) -> None:
    for _ in range(50):
        fake.script = [grpc.StatusCode.NOT_FOUND]
        future = client.containers.List.future(LIST)
        with pytest.raises(NotFound):
            future.result(timeout=10)
        assert isinstance(future.exception(), NotFound)


def test_future_gives_its_answer_and_calls_back(client: Client, fake: FakeContainerd) -> None:
    called = threading.Event()
    future = client.containers.List.future(LIST)
    future.add_done_callback(lambda _: called.set())
    assert len(future.result(timeout=10).containers) == 1
    assert future.exception() is None
    assert called.wait(10)
    assert names(fake) == ["List"]


def test_hanging_call_ends_at_its_deadline(client: Client, fake: FakeContainerd) -> None:
    fake.hang.clear()
    with pytest.raises(DeadlineExceeded, match=r"Containers\.List"):
        client.containers.List(LIST, timeout=0.3)


def test_answer_over_16_mib_is_refused(client: Client, fake: FakeContainerd) -> None:
    fake.size = 15 << 20
    assert len(client.containers.List(LIST).containers[0].id) == fake.size
    fake.size = 17 << 20
    with pytest.raises(ResourceExhausted):
        client.containers.List(LIST)


def test_failed_clean_up_of_a_lease_does_not_hide_the_error(client: Client, fake: FakeContainerd) -> None:
    with pytest.raises(KeyError), client.lease(expires=timedelta(hours=1)):  # noqa: PT012
        fake.script = [grpc.StatusCode.INTERNAL]
        raise KeyError("the block's own")
    assert names(fake) == ["Delete"]


def test_closed_client_says_so(fake: FakeContainerd, directory: Path) -> None:
    client = Client(directory / "socket")
    client.close()
    client.close()
    with pytest.raises(ClientClosed, match=r"Containers\.List: the client of .* is closed"):
        client.containers.List(LIST)
    assert fake.calls == []


def test_repr_names_socket_and_namespace(client: Client, directory: Path) -> None:
    assert repr(client) == f"Client('{directory}/socket', namespace='ours')"
    client.containers.List(LIST)


# --- the address -------------------------------------------------------------------------------------------------


def test_nothing_there(directory: Path) -> None:
    with pytest.raises(SocketMissing, match=r"there is no containerd socket at .*/absent\. Is containerd running\?"):
        Client(directory / "absent")


def test_nobody_listens(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(directory / "dead"))
    with pytest.raises(SocketMissing, match="nobody listens at"):
        Client(directory / "dead")


@pytest.mark.parametrize("kind", ["file", "directory", "below a file"])
def test_not_a_socket(directory: Path, kind: str) -> None:
    path = directory / "other"
    if kind == "directory":
        path.mkdir()
    else:
        path.touch()
    with pytest.raises(NotASocket, match="is not a"):
        Client(path / "below" if kind == "below a file" else path)


def test_address_too_long_for_a_socket(directory: Path) -> None:
    # Reached by a relative path, the socket exists all the same.
    deep = directory / ("d" * 100)
    deep.mkdir()
    here = os.open(".", os.O_RDONLY)
    os.chdir(deep)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("s")
            with pytest.raises(Unavailable, match="AF_UNIX path too long"):
                Client(deep / "s")
    finally:
        os.chdir(here)
        os.close(here)
