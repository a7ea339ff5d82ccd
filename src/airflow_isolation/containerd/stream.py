"""containerd's Streaming service: named two-way streams that a transfer refers to."""

from __future__ import annotations

import queue
import secrets
from typing import TYPE_CHECKING

from airflow_isolation.containerd import payload
from airflow_isolation.containerd.api import streaming_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.any_pb2 import Any as AnyMessage
    from google.protobuf.message import Message
    from typing_extensions import Self

    from airflow_isolation.containerd.client import Services


class Stream:
    """One stream, open until the block ends. ``timeout`` is for its whole life, in seconds.

    Iterate over it for what the daemon sends; the iteration ends when the daemon or ``cancel`` ends the stream.
    """

    def __init__(self, services: Services, purpose: str, *, timeout: float) -> None:
        self.id = f"{purpose}-{secrets.token_hex(8)}"
        # The queue holds one message. So ``send`` blocks when the daemon's flow control stops the stream.
        self._outgoing: queue.Queue[AnyMessage | None] = queue.Queue(maxsize=2)
        self._call = services.streaming.Stream(self._requests(), timeout=timeout)
        self._outgoing.put(payload.pack(streaming_pb2.StreamInit(id=self.id)))
        # The daemon's first answer says that it knows the stream: only now may a transfer name it.
        self._answers = iter(self._call)
        next(self._answers)

    def send(self, message: Message) -> None:
        self._outgoing.put(payload.pack(message))

    def cancel(self) -> None:
        self._call.cancel()

    def __iter__(self) -> Iterator[AnyMessage]:
        return self._answers

    def _requests(self) -> Iterator[AnyMessage]:
        while (message := self._outgoing.get()) is not None:
            yield message

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
        # gRPC's thread, which takes messages from the queue, ends when its iterator ends.
        try:
            self._outgoing.put_nowait(None)
        except queue.Full:
            self._outgoing.get_nowait()
            self._outgoing.put_nowait(None)
