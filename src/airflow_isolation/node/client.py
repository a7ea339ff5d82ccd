"""A worker's end of the node's protocol: have a workload started, and what only the node can do for it while it runs.

The connection is the workload's own. The node may be restarted under it: supervisor and workload talk directly, and the
connection is made anew when something is to be asked.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog

from airflow_isolation.bridge.agent_socket import AgentConnection, Hello
from airflow_isolation.bridge.ending import Ending
from airflow_isolation.bridge.pipe import open_channels
from airflow_isolation.bridge.socket_address import address_of
from airflow_isolation.bridge.workload import Workload
from airflow_isolation.cgroups import OutOfMemory, Usage, Victim
from airflow_isolation.cgroups.out_of_memory import Limit
from airflow_isolation.errors import ContainerNotFound, HostTrouble, IsolationError, RuntimeUnreachable
from airflow_isolation.node.protocol import VERSION, HungUp, Malformed, Packet, error_of, receive, send
from airflow_isolation.runtime.interface import Container, ContainerState, ExitStatus, Image, PendingExit
from airflow_isolation.runtime.pending_exit import UNKNOWN_EXIT
from airflow_isolation.settings.effective import Grant, Permissions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from airflow_isolation.node.request import StartRequest
    from airflow_isolation.settings.dag_metadata import Document
    from airflow_isolation.settings.effective import NodeSettings

log = structlog.get_logger(logger_name="airflow_isolation.node_client")

#: The node gives a sign of life every five seconds while it starts a workload.
SILENCE_SECONDS: Final = 60.0
#: For an answer about a workload that runs, in seconds.
ANSWER_SECONDS: Final = 30.0
#: Between two attempts to reach a node that is away, in seconds.
RETRY_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A workload that the node has started, and what its settings say of it.

    Attributes:
        grace: seconds between SIGTERM and SIGKILL.
        volumes: source on the host and target of each.

    """

    workload: Workload
    permissions: Permissions
    grace: float
    volumes: tuple[tuple[str, str], ...]


def start_by_node(
    settings: NodeSettings,
    request: StartRequest,
    *,
    sources: Sequence[str],
    document: Document | None = None,
    waits: Callable[[str], object] = lambda _: None,
) -> Started:
    """Have a workload started. When this fails nothing of it stays.

    :param sources: of the request's bind mounts, in their order: directories that this process may read.
    :param waits: is told, now and then, what the workload waits for until this host has room.
    :raises RuntimeUnreachable: there is no node, or it does not answer.
    :raises IsolationError: what the node says.
    """
    with ExitStack() as undo:
        ours, theirs = open_channels()
        undo.callback(ours.close)
        line = Line(settings, waits=waits)
        undo.callback(line.close)
        try:
            with ExitStack() as sent:
                descriptors = [channel.fileno() for channel in theirs.in_order()]
                for path in ("/proc/self/ns/mnt", *sources):
                    descriptors.append(_opened(path))
                    sent.callback(os.close, descriptors[-1])
                if document is not None:
                    descriptors.append(_in_memory(document.data))
                    sent.callback(os.close, descriptors[-1])
                packet = line.begin({"start": request.as_message()}, descriptors)
        finally:
            # A copy that stayed open here would keep end-of-file from ever coming.
            theirs.close()
        return _started(line, packet, ours, undo)


def _started(line: Line, packet: Packet, channels: Any, undo: ExitStack) -> Started:
    try:
        said = packet.message["started"]
        (agent,) = packet.descriptors
        connection = AgentConnection(socket.socket(fileno=agent))
    except (KeyError, ValueError, OSError) as error:
        packet.close()
        raise HostTrouble(f"What the node says of a started workload makes no sense: {error!r}") from error
    undo.callback(connection.close)
    try:
        permissions = Permissions(
            **{
                name: tuple(Grant(str(file), str(id)) for file, id in grants)
                for name, grants in said["permissions"].items()
            }
        )
        grace, why_fresh = float(said["grace"]), str(said["why_fresh"])
        volumes = tuple((str(source), str(target)) for source, target in said["volumes"])
        image = Image(reference=str(said["image"]["reference"]), digest=str(said["image"]["digest"]))
        container = Container(
            id=str(said["container"]), state=ContainerState.RUNNING, image=image.reference, pid=int(said["pid"])
        )
        line.container = container.id
        resources, slot = ExitStack(), ExitStack()
        if said["has_slot"]:
            slot.callback(line.tell, {"begun": {}})
        workload = Workload(
            container=container,
            image=image,
            hello=Hello(**said["hello"]),
            connection=connection,
            pending_exit=line,
            runtime=line,
            channels=channels,
            meter=line,
            resources=resources,
            start_mode=said["start_mode"],
            why_fresh=why_fresh,
            slot=slot,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise HostTrouble(f"What the node says of a started workload makes no sense: {error!r}") from error
    # From here on nothing can fail, and all of it is the workload's to release.
    resources.push(undo.pop_all())
    return Started(workload=workload, permissions=permissions, grace=grace, volumes=volumes)


def _opened(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HostTrouble(
            f"This worker can't read {path}, so its tasks may not either: {error.strerror}",
            hint="Let the worker's user read the DAG bundle, the config and the plugins directories",
        ) from error


def _in_memory(data: bytes) -> int:
    """:raises OSError: there is no memory for it."""
    descriptor = os.memfd_create("dag-metadata", os.MFD_CLOEXEC)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(data)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class Line(PendingExit):
    """The connection of one workload: its exit, its counters, and signals by way of the daemon.

    Not for several threads at a time.
    """

    def __init__(self, settings: NodeSettings, *, waits: Callable[[str], object] = lambda _: None) -> None:
        self._settings = settings
        self._waits = waits
        self._socket: socket.socket | None = None
        self._status: ExitStatus | None = None
        self._tried = 0.0
        self._is_over = False
        self._began = time.monotonic()
        #: Of the workload, once it is started.
        self.container = ""
        # For a selector that must not notice that the connection has been made anew.
        self._readable = select.epoll()

    # --- conversation

    def begin(self, message: Mapping[str, Any], descriptors: Sequence[int]) -> Packet:
        """Send the first message, and wait for its answer as long as the node lives.

        :raises RuntimeUnreachable: the node is away for ``node_timeout`` seconds, or ends meanwhile.
        :raises IsolationError: it refuses.
        """
        self._connect(deadline=time.monotonic() + self._settings.node_timeout)
        return self._ask({"version": VERSION, **message}, descriptors, seconds=SILENCE_SECONDS)

    def tell(self, message: Mapping[str, Any]) -> None:
        """Without an answer; a node that is away need not know."""
        if self._socket is not None:
            with suppress(HungUp):
                send(self._socket, message)

    def _ask(self, message: Mapping[str, Any], descriptors: Sequence[int] = (), *, seconds: float) -> Packet:
        if self._socket is None:
            raise self._away("it has ended")
        try:
            # A node that has refused the connection has said so before it hung up.
            with suppress(HungUp):
                send(self._socket, message, descriptors)
            while True:
                self._socket.settimeout(seconds)
                packet = receive(self._socket)
                if not self._took(packet):
                    return packet
        except (HungUp, TimeoutError) as error:
            self._drop()
            raise self._away("it has ended" if isinstance(error, HungUp) else "it does not answer") from error
        except Malformed:
            self._drop()
            raise

    def _took(self, packet: Packet) -> bool:
        """Whether a packet was no answer.

        :raises IsolationError: it says that what was asked for failed.
        """
        match packet.message:
            case {"failed": failed}:
                packet.close()
                raise error_of(failed)
            case {"exit": {"code": int(code)}}:
                self._status = ExitStatus(code=code)
            case {"exit": _}:
                self._status = ExitStatus(code=UNKNOWN_EXIT)
            case {"busy": _}:
                pass
            case {"waiting": {"why": str(why)}}:
                self._waits(why)
            case _:
                return False
        packet.close()
        return True

    def _connect(self, *, deadline: float) -> None:
        path = Path(self._settings.node)
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                connection.settimeout(max(0.1, deadline - time.monotonic()))
                with address_of(path) as address:
                    connection.connect(address)
            except OSError as error:
                connection.close()
                if time.monotonic() + RETRY_SECONDS > deadline or isinstance(error, PermissionError):
                    raise self._away(str(error.strerror or error)) from error
                time.sleep(RETRY_SECONDS)
            else:
                self._socket = connection
                self._readable.register(connection, select.EPOLLIN)
                return

    def _connect_again(self, *, seconds: float) -> None:
        """:raises RuntimeUnreachable: the node is still away.
        :raises ContainerNotFound: the container has gone meanwhile.
        """
        if self._socket is not None:
            return
        self._connect(deadline=time.monotonic() + seconds)
        try:
            self._ask({"version": VERSION, "resume": {"container": self.container}}, seconds=ANSWER_SECONDS)
        except IsolationError:
            self._drop()  # a node that refuses hangs up
            raise
        log.info("The node is back", container=self.container)

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _away(self, why: str) -> RuntimeUnreachable:
        return RuntimeUnreachable(
            f"The node at {self._settings.node} can't be reached: {why}",
            hint="Start `airflow containers node` as root on this host, and let this worker see its socket",
        )

    # --- the exit

    def fileno(self) -> int:
        return self._readable.fileno()

    def result(self, timeout: float | None = None) -> ExitStatus:
        if self._is_over:
            raise TimeoutError("this workload is over")
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._status is None:
            self._look_for_news(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if self._status is None and deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError("the node has not told of an end")
        return self._status

    def _look_for_news(self, timeout: float | None) -> None:
        if self._socket is None:
            self._try_again()
            if self._socket is None:
                time.sleep(min(RETRY_SECONDS, timeout or 0.0))
            return
        # Not select(2), which knows no descriptor above 1023.
        news = select.poll()
        news.register(self._socket, select.POLLIN)
        if not news.poll(None if timeout is None else timeout * 1000):
            return
        try:
            self._took(receive(self._socket))
        except (HungUp, Malformed):
            log.warning("The node has ended; the task goes on", container=self.container)
            self._drop()
        except IsolationError as error:
            log.warning("The node refuses", container=self.container, error=str(error))
            self._drop()

    def _try_again(self) -> None:
        """Now and then, and without waiting."""
        now = time.monotonic()
        if now - self._tried < RETRY_SECONDS:
            return
        self._tried = now
        try:
            self._connect_again(seconds=0.0)
        except ContainerNotFound:
            self._status = ExitStatus(code=UNKNOWN_EXIT)
        except IsolationError:
            pass

    # --- the counters

    def look(self) -> None:
        """The node does."""

    def read(self) -> None:
        """The node does."""

    def ending(self, code: int, *, by_others: bool = False, who: Callable[[], str] = str) -> Ending:
        """As the node says, who knows also who killed it; of a node that is away, nothing but the time is known."""
        del who
        said: Mapping[str, Any] = {}
        try:
            self._connect_again(seconds=self._settings.node_timeout)
            packet = self._ask({"ended": {"code": int(code), "by_others": by_others}}, seconds=ANSWER_SECONDS)
            said = packet.message["ending"]
            packet.close()
            self._is_over = True
            return _ending(said, code)
        except (IsolationError, KeyError, TypeError, ValueError) as error:
            log.warning("What a task has used is not known", container=self.container, error=str(error))
            return Ending(code=code, usage=Usage(wall=time.monotonic() - self._began))

    # --- signals

    def kill(self, id: str, signal: signal.Signals = signal.SIGKILL, *, everyone: bool = False) -> None:
        """As ``ContainerRuntime.kill``."""
        del id
        with suppress(ContainerNotFound):
            self._connect_again(seconds=0.0)
            self._ask({"kill": {"signal": int(signal), "everyone": everyone}}, seconds=ANSWER_SECONDS).close()

    def signals_asked_for(self, id: str) -> tuple[signal.Signals, ...]:
        """The node asks the daemon itself, when it tells the end."""
        del id
        return ()

    def close(self) -> None:
        """Have the node remove the container, unless the workload's end has been told. May be called twice."""
        if self.container and not self._is_over:
            self._is_over = True
            self.tell({"remove": {}})
        self._drop()
        if not self._readable.closed:
            self._readable.close()


def _ending(said: Mapping[str, Any], code: int) -> Ending:
    killing = said.get("out_of_memory")
    return Ending(
        code=code,
        usage=Usage(**said["usage"]),
        out_of_memory=_out_of_memory(killing) if killing is not None else None,
        from_outside=str(said.get("from_outside", "")),
    )


def _out_of_memory(said: Mapping[str, Any]) -> OutOfMemory:
    return OutOfMemory(
        **{
            **said,
            "limit": Limit(said["limit"]),
            "victims": tuple(Victim(**victim) for victim in said["victims"]),
        }
    )
