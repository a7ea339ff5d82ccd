"""Who speaks to the node: what the kernel says of the other end of a connection, and whether the settings allow it."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

_CREDENTIALS = struct.Struct("3i")
#: Not in Python's socket module; linux/asm-generic/socket.h.
_SO_PEERGROUPS: Final = 59
_GROUP = struct.Struct("I")
#: Python's getsockopt takes no more than 1024 bytes. Of a process in more groups its gid alone counts.
_MOST_GROUPS: Final = 256


@dataclass(frozen=True, slots=True)
class Client:
    """The process that made a connection, in the node's namespaces.

    Attributes:
        pid: 0 when it is in a pid namespace that the node does not see.
        groups: its gid and its supplementary groups.
        is_root_here: it is root, and in the node's own user and mount namespaces: it could do all that the node can.

    """

    uid: int
    groups: frozenset[int]
    pid: int
    is_root_here: bool = False

    def __str__(self) -> str:
        return f"uid {self.uid}, pid {self.pid}" if self.pid else f"uid {self.uid}"


def client_of(connection: socket.socket) -> Client:
    """As of when it connected.

    :raises OSError: the kernel does not tell.
    """
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(data)
    try:
        groups = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUPS * _GROUP.size)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        groups = b""
    found = {number for (number,) in _GROUP.iter_unpack(groups)}
    return Client(uid, frozenset({gid, *found}), pid, is_root_here=uid == 0 and _shares_our_namespaces(pid))


def _shares_our_namespaces(pid: int) -> bool:
    try:
        return all(
            Path(f"/proc/{pid}/ns/{kind}").stat().st_ino == Path(f"/proc/self/ns/{kind}").stat().st_ino
            for kind in ("user", "mnt", "pid")
        )
    except OSError:
        return False


def is_allowed(client: Client, allowed: Iterable[str]) -> bool:
    """Root and the node's own user always; else a name or number of ``node_clients`` must fit."""
    if client.uid in (0, os.geteuid()):
        return True
    return any(_fits(client, entry) for entry in allowed)


def _fits(client: Client, entry: str) -> bool:
    """Names that this host does not know fit nobody."""
    name = entry.removeprefix("@")
    try:
        if entry.startswith("@"):
            return (int(name) if name.isdigit() else grp.getgrnam(name).gr_gid) in client.groups
        return (int(name) if name.isdigit() else pwd.getpwnam(name).pw_uid) == client.uid
    except KeyError:
        return False
