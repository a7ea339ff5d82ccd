"""A connection to containerd: a stub for every service, with headers, deadlines, retries and our own errors.

    with Client("/run/containerd/containerd.sock", namespace="airflow") as client:
        client.containers.Get(containers_pb2.GetContainerRequest(id="a"))             # NotFound, never grpc.RpcError
        client.tasks.Wait(tasks_pb2.WaitRequest(container_id="a"), timeout=NO_DEADLINE)
        with client.lease(expires=timedelta(hours=1)) as leased:                      # same stubs, with the lease's header
            leased.snapshots.Prepare(...)

Requests and answers are in ``airflow_isolation.containerd.api``, one ``…_pb2`` a service; what travels in an Any is
packed by ``payload``. Stubs are grpcio's: ``call(request, timeout=seconds)`` blocks, ``call.future(request)`` doesn't,
and a stream is an iterator with ``cancel()``. All of them raise the errors of ``airflow_isolation.containerd.errors``.
"""

from __future__ import annotations

import logging
import secrets
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from google.protobuf.empty_pb2 import Empty

from airflow_isolation.containerd.api import introspection_pb2, leases_pb2
from airflow_isolation.containerd.api.containers_pb2_grpc import ContainersStub
from airflow_isolation.containerd.api.content_pb2_grpc import ContentStub
from airflow_isolation.containerd.api.diff_pb2_grpc import DiffStub
from airflow_isolation.containerd.api.events_pb2_grpc import EventsStub
from airflow_isolation.containerd.api.images_pb2_grpc import ImagesStub
from airflow_isolation.containerd.api.introspection_pb2_grpc import IntrospectionStub
from airflow_isolation.containerd.api.leases_pb2_grpc import LeasesStub
from airflow_isolation.containerd.api.namespaces_pb2_grpc import NamespacesStub
from airflow_isolation.containerd.api.snapshots_pb2_grpc import SnapshotsStub
from airflow_isolation.containerd.api.streaming_pb2_grpc import StreamingStub
from airflow_isolation.containerd.api.tasks_pb2_grpc import TasksStub
from airflow_isolation.containerd.api.transfer_pb2_grpc import TransferStub
from airflow_isolation.containerd.api.version_pb2_grpc import VersionStub
from airflow_isolation.containerd.calls import NO_DEADLINE, Calls, Headers
from airflow_isolation.containerd.errors import ContainerdError, NotFound
from airflow_isolation.containerd.unix_socket import await_socket

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

    from typing_extensions import Self

__all__ = ["DEFAULT_SOCKET", "NO_DEADLINE", "Client", "Services"]

logger = logging.getLogger(__name__)

DEFAULT_SOCKET = "/run/containerd/containerd.sock"

CHANNEL_OPTIONS = (
    # containerd's own limit, both ways (defaults.DefaultMaxRecvMsgSize).
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.max_send_message_length", 16 << 20),
    # Otherwise gRPC's pause between connection attempts grows to two minutes, much longer than a daemon's restart.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # What gRPC calls a pause is also how long one attempt may take. A daemon on a busy host greets late.
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Without it all channels of the process share one connection and one pause.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)


class Services:
    """Every service's stub over one channel."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.containers = ContainersStub(channel)
        self.content = ContentStub(channel)
        self.diff = DiffStub(channel)
        self.events = EventsStub(channel)
        self.images = ImagesStub(channel)
        self.introspection = IntrospectionStub(channel)
        self.leases = LeasesStub(channel)
        self.namespaces = NamespacesStub(channel)
        self.snapshots = SnapshotsStub(channel)
        self.streaming = StreamingStub(channel)
        self.tasks = TasksStub(channel)
        self.transfer = TransferStub(channel)
        self.version = VersionStub(channel)

    @cached_property
    def server_version(self) -> str:
        """The daemon's version as its packager wrote it, such as ``1.6.20~ds1``."""
        return self.version.Version(Empty()).version

    @cached_property
    def has_transfer(self) -> bool:
        """Whether the daemon has the Transfer service: 1.7 and later, unless it is disabled."""
        request = introspection_pb2.PluginsRequest(filters=["type==io.containerd.grpc.v1,id==transfer"])
        plugins = self.introspection.Plugins(request).plugins
        return any(not plugin.HasField("init_err") for plugin in plugins)


class Leased(Services):
    """The same services. What is made through them belongs to the lease ``lease_id``, and stays as long as the lease."""

    def __init__(self, channel: grpc.Channel, lease_id: str) -> None:
        super().__init__(channel)
        self.lease_id = lease_id


class Client(Services):
    """A connection to one containerd. Several threads may use it. Use after a fork is refused.

    Parameters
    ----------
    address:
        path of the unix socket.
    namespace:
        where containers, images, content and snapshots live; made by containerd on first use.
    timeout:
        seconds for a call that names no ``timeout`` of its own; ``timeout=NO_DEADLINE`` waits for ever.
    retry_for:
        seconds for which a call is repeated while the daemon restarts: calls that change nothing or may be made twice,
        and any call that can't have reached the daemon.
    wait_for_daemon:
        seconds to wait here for a daemon that is just starting. Zero fails at once.
    lease_labels:
        labels for every lease of this client, such as its owner.

    :raises SocketMissing: there is nothing at ``address``, or no process listens there.
    :raises NotASocket: there is something else at ``address``.
    :raises PermissionDenied: this user may not use the socket.

    """

    def __init__(
        self,
        address: str | os.PathLike[str] = DEFAULT_SOCKET,
        *,
        namespace: str = "default",
        timeout: float = 30.0,
        retry_for: float = 20.0,
        wait_for_daemon: float = 0.0,
        lease_labels: Mapping[str, str] | None = None,
    ) -> None:
        self.address = Path(address).absolute()
        self.namespace = namespace
        self._lease_labels = dict(lease_labels or {})
        await_socket(self.address, wait_for_daemon)
        self._calls = Calls(address=self.address, timeout=timeout, retry_for=retry_for)
        self._plain = grpc.insecure_channel(f"unix:{self.address}", options=CHANNEL_OPTIONS)
        # The first interceptor is the outermost: each attempt of a retried call carries the headers.
        self._channel = grpc.intercept_channel(
            self._plain, self._calls, Headers({"containerd-namespace": self.namespace})
        )
        super().__init__(self._channel)

    @contextmanager
    def lease(self, *, expires: timedelta, id: str = "") -> Iterator[Leased]:
        """Keep what is made through the yielded services from the garbage collector until the block ends.

        When the block fails, everything that only the lease kept is removed before the error goes on. If this process
        dies, the lease ends by itself after ``expires``.

        :raises AlreadyExists: ``id`` is taken. Without ``id``, a new one is made.
        """
        until = (datetime.now(timezone.utc) + expires).isoformat(timespec="seconds")
        request = leases_pb2.CreateRequest(
            id=id or f"airflow-isolation-{secrets.token_hex(8)}",
            labels={**self._lease_labels, "containerd.io/gc.expire": until},
        )
        lease = self.leases.Create(request).lease
        try:
            yield Leased(grpc.intercept_channel(self._channel, Headers({"containerd-lease": lease.id})), lease.id)
        except BaseException:
            # With sync the daemon answers after the garbage collector has run: then nothing is left.
            try:
                self.leases.Delete(leases_pb2.DeleteRequest(id=lease.id, sync=True))
            except ContainerdError as error:
                logger.warning("lease %s is left to expire at %s: %s", lease.id, until, error)
            raise
        try:
            self.leases.Delete(leases_pb2.DeleteRequest(id=lease.id))
        except NotFound:
            logger.debug("lease %s had expired", lease.id)

    def close(self) -> None:
        """End the connection and every call on it. May be called twice."""
        if self._calls.belongs_here():
            self._calls.close()
            self._plain.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({str(self.address)!r}, namespace={self.namespace!r})"
