"""containerd's events, as they happen: ``subscribe``.

Events are never repeated. After a reconnect, and also right after subscribing, list what is there and compare.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from airflow_isolation.containerd import payload
from airflow_isolation.containerd.api import event_types_pb2, events_pb2
from airflow_isolation.containerd.calls import NO_DEADLINE
from airflow_isolation.containerd.errors import Cancelled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.message import Message
    from typing_extensions import Self

    from airflow_isolation.containerd.api import types_pb2
    from airflow_isolation.containerd.client import Client

KINDS = (
    event_types_pb2.ContainerCreate,
    event_types_pb2.ContainerUpdate,
    event_types_pb2.ContainerDelete,
    event_types_pb2.TaskCreate,
    event_types_pb2.TaskStart,
    event_types_pb2.TaskExit,
    event_types_pb2.TaskDelete,
    event_types_pb2.TaskOOM,
    event_types_pb2.TaskExecAdded,
    event_types_pb2.TaskExecStarted,
    event_types_pb2.TaskPaused,
    event_types_pb2.TaskResumed,
)


@dataclass(frozen=True, slots=True)
class Event:
    """One event. ``topic`` is such as ``/tasks/exit``; ``message`` is one of ``KINDS``, or None for all other kinds."""

    topic: str
    namespace: str
    at: datetime
    message: Message | None


class Subscription:
    """Iterate over it for events, in a thread of your own; ``close`` from anywhere ends the iteration.

    The iteration raises Unavailable when the daemon goes away: subscribe again.
    """

    def __init__(self, client: Client, filters: tuple[str, ...]) -> None:
        request = events_pb2.SubscribeRequest(filters=filters)
        self._call = client.events.Subscribe(request, timeout=NO_DEADLINE)

    def __iter__(self) -> Iterator[Event]:
        try:
            for envelope in self._call:
                yield _event(envelope)
        except Cancelled:
            return

    def close(self) -> None:
        """May be called twice."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def subscribe(client: Client, *topics: str) -> Subscription:
    """Events of the client's namespace. If ``topics`` are given (such as ``/tasks/exit``), only events of these."""
    ours = f"namespace=={json.dumps(client.namespace)}"
    return Subscription(client, tuple(f"{ours},topic=={json.dumps(topic)}" for topic in topics) or (ours,))


def _event(envelope: types_pb2.Envelope) -> Event:
    message = next(
        (payload.unpack(envelope.event, kind) for kind in KINDS if payload.holds(envelope.event, kind)), None
    )
    return Event(envelope.topic, envelope.namespace, envelope.timestamp.ToDatetime(timezone.utc), message)
