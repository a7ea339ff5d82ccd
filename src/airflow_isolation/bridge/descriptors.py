"""Descriptors over a unix socket (SCM_RIGHTS, unix(7)), to a peer that may not read."""

from __future__ import annotations

import array
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def send_descriptors(connection: socket.socket, packet: bytes, descriptors: Iterable[int]) -> None:
    """Send one packet with descriptors beside it; the caller still owns its copies. Never waits.

    ``socket.send_fds`` of Python 3.9 to 3.13 takes flags and passes none of them on: it waits for a peer that does not read
    (https://github.com/python/cpython/issues/107898).

    :raises BlockingIOError: the peer has not read for so long that there is no room.
    :raises OSError: the peer is gone, or the packet is too large.
    """
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
    connection.sendmsg([packet], [rights], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
