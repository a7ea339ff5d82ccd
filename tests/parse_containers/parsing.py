"""The manager's side of one parse, as small as can be: four socketpairs, the first frame, answers, and what arrives."""

from __future__ import annotations

import select
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from airflow_isolation.bridge.parse_container import Ended, ParseContainer, Started
from airflow_isolation.bridge.pipe import open_channels

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from airflow_isolation.bridge.pipe import Channel

SECONDS = 90


@dataclass
class Parse:
    """A parse under way; ``finish`` gives how it ended."""

    container: ParseContainer
    channels: dict[int, Channel]
    received: dict[int, bytearray] = field(default_factory=lambda: {number: bytearray() for number in range(4)})
    started: bool = False
    ended: Ended | None = None
    answered: int = 0

    @property
    def stdout(self) -> str:
        return self.received[1].decode(errors="replace")

    @property
    def stderr(self) -> str:
        return self.received[2].decode(errors="replace")

    @property
    def result(self) -> Any:
        """The body of the first frame that the child sent: what Airflow found in the file."""
        frame = bytes(self.received[0])
        length = int.from_bytes(frame[:4], "big")
        assert len(frame) >= 4 + length > 4, f"no result: {self}"
        return msgspec.msgpack.decode(frame[4 : 4 + length])[1]

    def dag_ids(self) -> list[str]:
        result = self.result
        assert not result["import_errors"], result["import_errors"]
        return [dag["data"]["dag"]["dag_id"] for dag in result["serialized_dags"]]

    def finish(self) -> Ended:
        """Until it has ended and all channels are closed."""
        self.until(lambda: self.ended is not None and not self.channels)
        assert self.ended is not None
        return self.ended

    def until(self, done: Callable[[], bool]) -> None:
        """Take what comes until ``done``."""
        deadline = time.monotonic() + SECONDS
        while not done():
            assert time.monotonic() < deadline, f"nothing more came: {self}"
            poll = select.poll()
            for channel in self.channels.values():
                poll.register(channel, select.POLLIN)
            if self.ended is None:
                poll.register(self.container, select.POLLIN)
            ready = {descriptor for descriptor, _ in poll.poll(200)}
            for number, channel in list(self.channels.items()):
                if channel.fileno() in ready:
                    self._receive(number, channel)
            if self.ended is None and self.container.fileno() in ready:
                match self.container.news():
                    case Started():
                        self.started = True
                    case Ended() as ended:
                        self.ended = ended

    def _receive(self, number: int, channel: Channel) -> None:
        chunk = b""
        with suppress(ConnectionError):
            chunk = channel.recv(65536)
        if not chunk:
            channel.close()
            del self.channels[number]
            return
        self.received[number] += chunk
        if number == 0:
            assert isinstance(channel, socket.socket)
            self._answer(channel)

    def _answer(self, channel: socket.socket) -> None:
        buffer = self.received[0]
        while len(buffer) >= self.answered + 4:
            end = self.answered + 4 + int.from_bytes(buffer[self.answered : self.answered + 4], "big")
            if len(buffer) < end:
                return
            frame = buffer[self.answered + 4 : end]
            self.answered = end
            with suppress(ConnectionError, msgspec.DecodeError, TypeError, IndexError):
                reply = msgspec.msgpack.encode([msgspec.msgpack.decode(frame)[0], None, None])
                channel.sendall(len(reply).to_bytes(4, "big") + reply)

    def close(self) -> None:
        for channel in self.channels.values():
            channel.close()
        self.channels.clear()


def begin(
    container: ParseContainer, file: Path, environment: Mapping[str, str] | None = None, *, modules: Sequence[str] = ()
) -> Parse:
    """Hand a file over; the caller finishes or closes it."""
    request = {
        "file": str(file),
        "bundle_path": str(file.parent),
        "bundle_name": "tests",
        "callback_requests": [],
        "type": "DagFileParseRequest",
        # For the stand-in, which has no msgpack.
        "_": f"FILE={file}=FILE",
    }
    ours, theirs = open_channels()
    parse = Parse(container, dict(enumerate(ours.in_order())))
    try:
        container.parse(environment=environment or {}, modules=modules, descriptors=theirs.in_order())
        body = msgspec.msgpack.encode([0, request, None])
        ours.requests.sendall(len(body).to_bytes(4, "big") + body)
    except BaseException:
        parse.close()
        raise
    finally:
        theirs.close()
    return parse


def parse(container: ParseContainer, file: Path, environment: Mapping[str, str] | None = None) -> Parse:
    """Parse a file to its end."""
    parse = begin(container, file, environment)
    try:
        parse.finish()
    finally:
        parse.close()
    return parse
