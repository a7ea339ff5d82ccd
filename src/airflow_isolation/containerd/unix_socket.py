"""Checks that a process listens at containerd's address. gRPC only says "failed to connect"; this module says why."""

from __future__ import annotations

import os
import socket
import stat
import time
from typing import TYPE_CHECKING

from airflow_isolation.containerd.errors import NotASocket, PermissionDenied, SocketMissing, Unavailable

if TYPE_CHECKING:
    from pathlib import Path


def await_socket(address: Path, seconds: float) -> None:
    """Check that a process listens at ``address``; wait up to ``seconds`` for it.

    :raises SocketMissing, NotASocket, PermissionDenied: as ``check_socket``.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            check_socket(address)
            return
        except Unavailable:
            if time.monotonic() >= end:
                raise
        time.sleep(0.1)


def check_socket(address: Path) -> None:
    """Connect and hang up.

    :raises SocketMissing, NotASocket, PermissionDenied: with the address and what to do.
    """
    try:
        mode = address.stat().st_mode
        if not stat.S_ISSOCK(mode):
            raise NotASocket(f"{address} is not a socket", hint="Give the path of containerd's socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(5)
            probe.connect(str(address))
    except FileNotFoundError as error:
        raise SocketMissing(f"there is no containerd socket at {address}", hint="Is containerd running?") from error
    except ConnectionRefusedError as error:
        raise SocketMissing(f"nobody listens at {address}", hint="Is containerd running?") from error
    except PermissionError as error:
        raise PermissionDenied(
            f"user {os.geteuid()} may not use the containerd socket {address}",
            hint="Run as root, or give a group of this user the socket (containerd's config.toml: [grpc] gid)",
        ) from error
    except NotADirectoryError as error:
        raise NotASocket(f"{address} leads through something that is not a directory") from error
    except OSError as error:
        # A path of more than 107 bytes, a listener that never accepts, …
        raise Unavailable(f"can't connect to {address}: {error}") from error
