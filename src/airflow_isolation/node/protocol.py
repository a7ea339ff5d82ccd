"""Packets between a worker and the node: one JSON object each, with descriptors beside it (unix(7), SOCK_SEQPACKET).

Both sides read the other's packets as a stranger's: they have a largest size, and whatever does not parse ends that
connection. docs/node.md lists the messages.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from airflow_isolation import errors
from airflow_isolation.bridge.descriptors import send_descriptors
from airflow_isolation.errors import IsolationError, SettingError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: Of this conversation. A node that speaks another one refuses in words.
VERSION: Final = 1

#: Bytes. The kernel's default for a socket's buffer (net.core.wmem_max) allows little more.
PACKET_LIMIT: Final = 192 * 1024

#: Of one packet.
MOST_DESCRIPTORS: Final = 32

_DESCRIPTOR = struct.Struct("i")


class Malformed(IsolationError):
    """The peer sent what is no message of this conversation."""


class HungUp(Exception):
    """The peer has closed the connection, or is gone."""


@dataclass(frozen=True, slots=True)
class Packet:
    """A message and the descriptors beside it, which whoever has the packet closes."""

    message: Mapping[str, Any]
    descriptors: tuple[int, ...] = ()

    def close(self) -> None:
        """Once only, and not when the descriptors have another owner by now."""
        close_all(self.descriptors)


def send(connection: socket.socket, message: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Never waits for a peer that does not read.

    :raises Malformed: the message is too large.
    :raises HungUp: the peer is gone, or has not read for long.
    """
    packet = json.dumps(message).encode()
    if len(packet) > PACKET_LIMIT:
        raise Malformed(
            f"A message to the node has {len(packet)} bytes, more than {PACKET_LIMIT}",
            hint="Airflow's configuration and `environment` together must stay below 190 KB",
        )
    try:
        send_descriptors(connection, packet, descriptors)
    except OSError as error:
        raise HungUp(str(error)) from error


def receive(connection: socket.socket) -> Packet:
    """The next packet; waits as long as the connection's own timeout says.

    :raises Malformed: it is too large, has too many descriptors, or is no JSON object.
    :raises HungUp: the peer is gone.
    :raises TimeoutError: nothing came.
    :raises BlockingIOError: so, of a connection that does not wait.
    """
    try:
        data, ancillary, flags, _ = _received(connection)
    except (BlockingIOError, TimeoutError):
        raise
    except OSError as error:
        raise HungUp(str(error)) from error
    descriptors = tuple(_descriptors(ancillary))
    try:
        return Packet(_message(data, flags), descriptors)
    except BaseException:
        close_all(descriptors)
        raise


def _received(connection: socket.socket) -> tuple[bytes, list[tuple[int, int, bytes]], int, Any]:
    room = PACKET_LIMIT, socket.CMSG_SPACE(MOST_DESCRIPTORS * _DESCRIPTOR.size), socket.MSG_CMSG_CLOEXEC
    try:
        return connection.recvmsg(*room)
    except ConnectionResetError:
        # The peer has closed with a packet of ours unread. Linux tells that once, before what the peer had sent.
        return connection.recvmsg(*room)


def _message(data: bytes, flags: int) -> Mapping[str, Any]:
    if flags & socket.MSG_CTRUNC:
        raise Malformed(f"a packet has more than {MOST_DESCRIPTORS} descriptors")
    if flags & socket.MSG_TRUNC:
        raise Malformed(f"a packet has more than {PACKET_LIMIT} bytes")
    if not data:
        raise HungUp("the peer hung up")
    try:
        message = json.loads(data)
    except (ValueError, RecursionError):
        raise Malformed("a packet is not JSON") from None
    if not isinstance(message, dict):
        raise Malformed("a packet is no JSON object")
    return message


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    found: list[int] = []
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            whole = len(data) - len(data) % _DESCRIPTOR.size
            found += (number for (number,) in _DESCRIPTOR.iter_unpack(data[:whole]))
    return found


def close_all(descriptors: Sequence[int]) -> None:
    """Each of them, whatever is wrong with one."""
    for descriptor in descriptors:
        with suppress(OSError):
            os.close(descriptor)


def told(error: IsolationError) -> dict[str, Any]:
    """An error as a message has it."""
    said: dict[str, Any] = {"kind": _known(type(error)), "message": error.message, "hint": error.hint}
    if isinstance(error, SettingError):
        said |= {"source": error.source, "line": error.line, "key": error.key}
    return said


def error_of(said: object) -> IsolationError:
    """The error that ``told`` made a message of; of the node's classes what a worker knows."""
    if not isinstance(said, dict):
        return IsolationError("The node refused, and did not say why", hint="Look at the node's log")
    found = getattr(errors, str(said.get("kind")), IsolationError)
    kind: type[IsolationError] = (
        found if isinstance(found, type) and issubclass(found, IsolationError) else IsolationError
    )
    message, hint = str(said.get("message", "")), str(said.get("hint", ""))
    if issubclass(kind, SettingError):
        line = said.get("line")
        of_setting: type[SettingError] = kind
        return of_setting(
            message,
            source=str(said.get("source", "")),
            line=line if isinstance(line, int) else None,
            key=str(said.get("key", "")),
            hint=hint,
        )
    return kind(message, hint=hint)


def _known(kind: type[IsolationError]) -> str:
    """The nearest class that stands in ``errors``: a worker may be of another release."""
    known = (one.__name__ for one in kind.__mro__ if getattr(errors, one.__name__, None) is one)
    return next(known, IsolationError.__name__)
