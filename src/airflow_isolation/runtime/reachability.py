"""Finds out why a daemon can't be reached; the error names the socket and the remedy."""

from __future__ import annotations

import errno
import grp
import os
import socket
import stat
import struct
from pathlib import Path

from airflow_isolation.errors import RuntimeUnreachable

_CONNECT_SECONDS = 1.0


def unreachable(backend: str, socket_path: str, reason: str) -> RuntimeUnreachable:
    """Look at the socket now, and return an error that says what is wrong; ``reason`` has the words of the failed call."""
    try:
        status = Path(socket_path).stat()
    except FileNotFoundError:
        return RuntimeUnreachable(
            f"{backend} can't be reached: there is no socket {socket_path}",
            hint=f"Start {backend}, or correct socket_path",
        )
    except PermissionError:
        return RuntimeUnreachable(
            f"{backend} can't be reached: this process may not enter the directory of {socket_path}",
            hint=_membership(socket_path, None),
        )
    except OSError as error:
        return RuntimeUnreachable(
            f"{backend} can't be reached at {socket_path}: {error.strerror}", hint="Correct socket_path"
        )
    if not stat.S_ISSOCK(status.st_mode):
        return RuntimeUnreachable(
            f"{backend} can't be reached: {socket_path} is not a socket", hint="Correct socket_path"
        )
    failure = _connect(socket_path)
    if failure in (errno.EACCES, errno.EPERM):
        return RuntimeUnreachable(
            f"{backend} can't be reached: this process may not use the socket {socket_path}",
            hint=_membership(socket_path, status),
        )
    if failure == errno.ECONNREFUSED:
        return RuntimeUnreachable(
            f"{backend} can't be reached: nothing listens at the socket {socket_path}",
            hint=f"{backend} has ended or is being restarted: look at its log",
        )
    return RuntimeUnreachable(
        f"{backend} at {socket_path} did not answer: {reason}",
        hint=f"{backend} may be overloaded or restarting: look at its log",
    )


def peer_pid(socket_path: str) -> int:
    """The pid of the process that listens at the socket; 0 when it is not known."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(_CONNECT_SECONDS)
        try:
            client.connect(socket_path)
        except OSError:
            return 0
        pid, _, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(pid)


def sees_shims(socket_path: str) -> bool:
    """Whether the shims of the daemon at the socket are among the processes here, and may be ended."""
    return os.geteuid() == 0 and peer_pid(socket_path) > 0


def _connect(socket_path: str) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(_CONNECT_SECONDS)
        try:
            client.connect(socket_path)
        except OSError as error:
            return error.errno or 0
    return 0


def _membership(socket_path: str, status: os.stat_result | None) -> str:
    who = f"uid {os.geteuid()}"
    if status is None or not status.st_mode & stat.S_IWGRP or status.st_gid == 0:
        return f"Run as root, or give {who} access to {socket_path} through a group"
    try:
        group = grp.getgrgid(status.st_gid).gr_name
    except KeyError:
        group = str(status.st_gid)
    return f"Make the user with {who} a member of the group {group}, and start the process anew"
