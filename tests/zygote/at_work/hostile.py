"""In the container, in the place of agent/zygote.py: speaks its protocol, and cheats as AIRFLOW_TEST_CHEAT says.

Standard library only: it becomes a module of the image.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import time
from typing import Any, NoReturn

LIBC = ctypes.CDLL(None, use_errno=True)
NAMESPACES = 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000 | 0x02000000


def main() -> NoReturn:
    """Take over before the agent's zygote knows: its arguments are all that it has."""
    worker, listening = (socket.socket(fileno=int(number)) for number in sys.argv[2:4])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    worker.send(json.dumps({"ready": {"memory": 1}}).encode())
    worker.close()
    cheat = globals()[os.environ["AIRFLOW_TEST_CHEAT"]]
    while True:
        asker, _ = listening.accept()
        packet, descriptors, _, _ = socket.recv_fds(asker, 65536, 5)
        if packet:
            cheat(asker, descriptors)
        asker.close()
        for descriptor in descriptors:
            os.close(descriptor)


def say(asker: socket.socket, message: Any) -> None:
    asker.send(message if isinstance(message, bytes) else json.dumps(message).encode())


def hear(asker: socket.socket) -> Any:
    packet = asker.recv(1024 * 1024)
    return json.loads(packet) if packet else None


def nonsense(asker: socket.socket, _: list[int]) -> None:
    say(asker, b"\xff\xfe\x00")


def a_list(asker: socket.socket, _: list[int]) -> None:
    say(asker, [["forked"]])


def too_much(asker: socket.socket, _: list[int]) -> None:
    """More than a packet may hold: the worker sees a part of it."""
    say(asker, {"failed": "x" * 150_000})


def hangs_up(_asker: socket.socket, _: list[int]) -> None:
    """And says nothing."""


def forged_pid(asker: socket.socket, _: list[int]) -> None:
    """Says that it is process 1 of the host: the kernel must refuse."""
    credentials = (ctypes.c_int * 3)(1, os.getuid(), os.getgid())
    ancillary = [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, bytes(credentials))]
    try:
        asker.sendmsg([b'{"forked": {}}'], ancillary)
        hear(asker)
        asker.sendmsg([b'{"entered": {}}'], ancillary)
        hear(asker)
    except OSError as error:
        say(asker, {"failed": f"forging is refused: {error!r}"})


def stays_outside(asker: socket.socket, _: list[int]) -> None:
    """A fork says that it has entered, and is where it was."""
    if os.fork():
        return
    say(asker, {"forked": {}})
    hear(asker)
    say(asker, {"entered": {}})
    outlive(asker)


def the_zygote_itself(asker: socket.socket, _: list[int]) -> None:
    """Has itself moved into the container's cgroups, and says that it has entered."""
    say(asker, {"forked": {}})
    hear(asker)
    say(asker, {"entered": {}})
    hear(asker)


def keeps_root(asker: socket.socket, descriptors: list[int]) -> None:
    """Enters the container, and stays root there."""
    if os.fork():
        return
    say(asker, {"forked": {}})
    hear(asker)
    LIBC.setns(descriptors[4], NAMESPACES)
    if os.fork() or os.fork():
        os._exit(0)
    say(asker, {"entered": {}})
    outlive(asker)


def outlive(asker: socket.socket) -> NoReturn:
    """Stay whatever the worker says."""
    hear(asker)
    while True:
        time.sleep(1)
