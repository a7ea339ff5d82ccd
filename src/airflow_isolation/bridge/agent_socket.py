"""The worker's side of the conversation with the agent, process 1 of a container. ``agent/agent.py`` describes the protocol.

The agent is not trusted: the size of its packets is bounded, and a packet that can't be parsed ends only this workload.
"""

from __future__ import annotations

import errno
import json
import os
import selectors
import socket
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_isolation import agent
from airflow_isolation.bridge.descriptors import send_descriptors
from airflow_isolation.bridge.socket_address import address_of
from airflow_isolation.errors import ContainerFailed, ContainerKilled, HostTrouble

if TYPE_CHECKING:
    import signal
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from airflow_isolation.bridge.pipe import Open
    from airflow_isolation.runtime.interface import PendingExit

PACKET_LIMIT = 64 * 1024


@dataclass(frozen=True, slots=True)
class Hello:
    """The agent's first message: the versions that it found in the image; None for what is not installed."""

    agent: int
    python: str
    airflow: str | None
    task_sdk: str | None


class EndedBeforeHello(Exception):
    """The container's first process ended before the agent's hello; its output says why."""


class AgentListener:
    """Waits for the agent of one container, on a socket in the directory that is mounted into it."""

    def __init__(self, directory: Path) -> None:
        """Make the socket.

        :raises OSError: there is no such directory, or it can't be written.
        """
        self._path = directory / agent.SOCKET_NAME
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with address_of(self._path) as address:
                self._socket.bind(address)
            # Any uid may connect: the agent has the image's uid, not ours. ``accept`` asks the kernel which process it is.
            self._path.chmod(0o666)
            self._socket.listen(1)
        except OSError:
            self._socket.close()
            raise

    def accept(self, *, pid: int, ended: PendingExit, timeout: float) -> tuple[AgentConnection, Hello]:
        """Wait for the connection of process ``pid`` (the container's first, in our pid namespace) and its hello.

        Connections of other processes are closed. Takes at most ``timeout`` seconds.

        :raises EndedBeforeHello: the container ended first.
        :raises TimeoutError: there was no hello in time.
        :raises ContainerFailed: the peer does not speak the agent's protocol.
        """
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            selector.register(ended.fileno(), selectors.EVENT_READ)
            while (remaining := deadline - time.monotonic()) > 0:
                ready = {key.fileobj for key, _ in selector.select(remaining)}
                # Look at the listener first: the process may have sent its hello and ended already.
                if self._socket in ready:
                    peer, _ = self._socket.accept()
                    if _peer_pid(peer) != pid:
                        peer.close()
                        continue
                    connection = AgentConnection(peer)
                    try:
                        return connection, connection.hello(max(0.1, deadline - time.monotonic()))
                    except BaseException:
                        connection.close()
                        raise
                elif ready:
                    raise EndedBeforeHello
        raise TimeoutError

    def close(self) -> None:
        """May be called twice."""
        self._socket.close()
        self._path.unlink(missing_ok=True)


class AgentConnection:
    """The lifeline: the connection to the agent. When it closes before the workload's end, the agent ends the workload."""

    def __init__(self, peer: socket.socket) -> None:
        self._socket = peer

    def fileno(self) -> int:
        """The descriptor; it is readable when ``exited`` or ``news`` has something."""
        return self._socket.fileno()

    def hello(self, timeout: float) -> Hello:
        self._socket.settimeout(timeout)
        try:
            said = self._receive()
        except TimeoutError as error:
            raise ContainerFailed("The agent connected and then said nothing") from error
        finally:
            self._socket.settimeout(None)
        if said is None:
            raise EndedBeforeHello
        match said.get("hello"):
            case {"agent": int(version), "python": str(python), "airflow": str() | None as airflow, "task_sdk": sdk}:
                return Hello(version, python, airflow, sdk if isinstance(sdk, str) else None)
        raise ContainerFailed(f"The agent's hello is not one: {said!r:.200}")

    def start(self, *, purpose: str, environment: Mapping[str, str], grace: float, descriptors: Sequence[Open]) -> None:
        """Send the work and its four descriptors. The caller still has to close its own copies. To be called once.

        :raises ContainerFailed: the environment is too large for one packet.
        :raises ContainerKilled: the agent is gone.
        """
        message = {"start": {"purpose": purpose, "environment": dict(environment), "grace": grace}}
        self._hand_over(message, descriptors)

    def serve(self, *, environment: Mapping[str, str], scratch: Sequence[str]) -> None:
        """Have the agent import Airflow and wait for files to parse; after each file it empties the directories ``scratch``.

        :raises ContainerFailed: the environment is too large for one packet.
        :raises ContainerKilled: the agent is gone.
        """
        self._hand_over({"serve": {"environment": dict(environment), "scratch": list(scratch)}}, ())

    def parse(self, *, environment: Mapping[str, str], modules: Sequence[str], descriptors: Sequence[Open]) -> None:
        """As ``start``, for an agent that serves. May be called once for each file. Never blocks."""
        self._hand_over({"parse": {"environment": dict(environment), "modules": list(modules)}}, descriptors)

    def become_zygote(
        self,
        *,
        user: str,
        drop: Collection[str],
        environment: Mapping[str, str],
        modules: Sequence[str],
        limits: Mapping[str, float],
        listener: socket.socket,
    ) -> None:
        """Have the agent import Airflow, and fork for every worker that connects to ``listener``.

        :raises ContainerFailed: the environment is too large for one packet.
        :raises ContainerKilled: the agent is gone.
        """
        what = {
            "user": user,
            "drop": sorted(drop),
            "environment": dict(environment),
            "modules": list(modules),
            **limits,
        }
        self._hand_over({"zygote": what}, (listener,))

    def adopt(self, *, child: int, grace: float, timeout: float) -> None:
        """Tell process 1 about its new child; when this returns, process 1 watches the child.

        :raises ContainerFailed: process 1 does not answer within ``timeout`` seconds.
        :raises ContainerKilled: process 1 is gone.
        """
        self._hand_over({"adopt": {"child": child, "grace": grace}}, ())
        self._socket.settimeout(timeout)
        try:
            said = self._receive()
        except ConnectionResetError:
            said = None
        except OSError as error:
            raise ContainerFailed(f"Process 1 does not answer: {error}") from error
        finally:
            self._socket.settimeout(None)
        if said is None:
            raise ContainerKilled("Process 1 ended before it could adopt the workload")
        if "adopted" not in said:
            raise ContainerFailed(f"Process 1 did not adopt the workload: {said!r:.200}")

    def await_claim(self, *, seconds: float, listener: socket.socket, child: socket.socket) -> None:
        """Have process 1 wait for a worker that needs the container, and end if none comes.

        It keeps the ``child``'s connection.

        :raises ContainerKilled: process 1 is gone.
        """
        self._hand_over({"await": {"seconds": seconds}}, (listener, child))

    def waiting(self, timeout: float) -> socket.socket:
        """The connection of the child that waits in a container that has just been claimed.

        :raises ContainerFailed: process 1 is gone, or does not give it within ``timeout`` seconds.
        """
        self._socket.settimeout(timeout)
        try:
            packet, descriptors, _, _ = socket.recv_fds(self._socket, PACKET_LIMIT, 1)
        except OSError as error:
            raise ContainerFailed(f"Process 1 does not give the child's connection: {error}") from error
        finally:
            self._socket.settimeout(None)
        if len(descriptors) != 1:
            raise ContainerFailed(f"Process 1 gave no child's connection: {packet!r:.200}")
        try:
            connection = socket.socket(fileno=descriptors[0])
        except OSError as error:
            os.close(descriptors[0])
            raise ContainerFailed(f"What process 1 gave for the child's connection is no socket: {error}") from error
        connection.set_inheritable(False)
        return connection

    def _hand_over(self, message: dict[str, Any], descriptors: Sequence[Open]) -> None:
        packet = json.dumps(message).encode()
        try:
            send_descriptors(self._socket, packet, (descriptor.fileno() for descriptor in descriptors))
        except (OSError, ValueError) as error:  # ValueError: our end has been closed
            raise not_handed_over(error, "the agent", size=len(packet)) from error

    def news(self) -> dict[str, Any] | None:
        """The next message, when the descriptor is readable; None when the agent is gone, or its message is not valid."""
        try:
            return self._receive()
        except (OSError, ContainerFailed):
            return None

    def cut(self) -> None:
        """Close both directions at once, from any thread.

        The agent then acts as if the worker died, ``news`` as if the agent did.
        """
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def send_signal(self, number: signal.Signals) -> bool:
        """Have the agent pass a signal to the workload's process group; False when the agent is gone."""
        try:
            self._socket.send(json.dumps({"signal": int(number)}).encode(), socket.MSG_DONTWAIT)
        except OSError:
            return False
        return True

    def exited(self) -> int | None:
        """How the workload ended, when the descriptor is readable: its exit code, or minus the signal's number.

        None when the agent ended without a message: then use the container's own exit.
        """
        return end_of(self.news() or {})

    def close(self) -> None:
        """Hang up. Unless the workload has ended, the agent then acts as if the worker died. May be called twice."""
        self._socket.close()

    def _receive(self) -> dict[str, Any] | None:
        packet = self._socket.recv(PACKET_LIMIT)
        if not packet:
            return None
        try:
            said = json.loads(packet)
        except (ValueError, RecursionError) as error:
            raise ContainerFailed("The agent sent something that is not JSON") from error
        if not isinstance(said, dict):
            raise ContainerFailed(f"The agent sent {type(said).__name__} where a message belongs")
        return said


def not_handed_over(error: OSError | ValueError, to: str, *, size: int) -> ContainerFailed:
    """The error for a packet of ``size`` bytes that could not be sent."""
    if isinstance(error, OSError) and error.errno == errno.EMSGSIZE:
        return ContainerFailed(
            f"The work, {size} bytes with its environment, is too large to be handed to {to}: {error}",
            hint="Airflow's configuration and `environment` together must stay below 200 KB",
        )
    if isinstance(error, ValueError | BrokenPipeError | ConnectionResetError) or error.errno == errno.EBADF:
        return ContainerKilled(
            f"The work could not be handed to {to}, which has ended: {error}",
            hint="Somebody killed the container or its shim, or the kernel did because memory ran out",
        )
    return HostTrouble(f"The work could not be handed to {to}: {error}")


def end_of(message: Mapping[str, Any]) -> int | None:
    """The exit code in an ``exited`` message, or minus the signal's number; None when the message is not valid."""
    match message.get("exited"):
        case {"code": int(code)} if 0 <= code <= 255:
            return code
        case {"signal": int(number)} if 0 < number <= 64:
            return -number
    return None


def _peer_pid(peer: socket.socket) -> int:
    pid, _, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(pid)
