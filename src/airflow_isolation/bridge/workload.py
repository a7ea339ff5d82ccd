"""A workload in its container, from nothing to gone.

1. a directory ``<state_dir>/workloads/<id>`` with the agent and the socket on which it is awaited
2. the container, created and started; its exit is asked for before it starts
3. the agent's hello, raced against the container's end and ``start_timeout``
4. the hand-over of the four descriptors; from then on supervisor and workload talk directly
5. the end: the agent's word, or else the runtime's; a last look at the counters of the container's cgroup
6. the release of all of it, in reverse
"""

from __future__ import annotations

import enum
import os
import select
import shutil
import signal
import socket
import stat
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import structlog

from airflow_isolation import agent
from airflow_isolation.bridge.agent_socket import AgentConnection, AgentListener, EndedBeforeHello, Hello
from airflow_isolation.bridge.ending import Meter
from airflow_isolation.bridge.prune import abandon, held
from airflow_isolation.container_spec import Mount
from airflow_isolation.errors import (
    ContainerFailed,
    ContainerRuntimeError,
    ImageInvalid,
    IsolationError,
    RuntimeUnreachable,
)
from airflow_isolation.runtime.pending_exit import UNKNOWN_EXIT

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from typing_extensions import Self

    from airflow_isolation.bridge.ending import Ending
    from airflow_isolation.container_spec import ContainerSpec
    from airflow_isolation.runtime.interface import Container, ContainerRuntime, Image, PendingExit

log = structlog.get_logger(logger_name="airflow_isolation.workload")

#: How long the runtime may take to report an end that the agent's silence announces, in seconds.
EXIT_REPORT_TIMEOUT = 20.0

#: How long an agent that has said its last word may take to end, in seconds.
AGENT_END_TIMEOUT = 1.0

#: Airflow's supervisor names the signal in its message, and calls a SIGKILL a probable OOM, if the exit code has a
#: name: psutil's negative signals have one, and so have these.
NegativeSignal = enum.IntEnum(  # type: ignore[misc]  # the members are this machine's signals
    "NegativeSignal", {number.name: -number.value for number in signal.Signals}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What is to be started.

    Attributes:
        spec: the container, without argv and without the agent's mount, which are added here.
        python: the interpreter in the image, a name on its PATH or an absolute path.
        purpose: ``task`` or ``parse``.
        environment: for the workload's process alone; it is not in the container's record.
        airflow: the worker's version of Airflow; the image must have the same minor.
        start_timeout: seconds from start to hello.
    """

    id: str
    spec: ContainerSpec
    image: Image
    purpose: str
    environment: Mapping[str, str]
    airflow: str
    python: str = "python3"
    start_timeout: float = 60.0


@dataclass(frozen=True, slots=True)
class Channels:
    """The supervisor's ends of the four socketpairs."""

    requests: socket.socket
    stdout: socket.socket
    stderr: socket.socket
    logs: socket.socket


class Workload:
    """A started workload. ``close`` releases everything, whether it has ended or not.

    Attributes:
        ending: what it has used, and whether it died for want of memory; from when ``exit_code`` has an answer.

    """

    def __init__(
        self,
        *,
        container: Container,
        image: Image,
        hello: Hello,
        connection: AgentConnection,
        pending_exit: PendingExit,
        runtime: ContainerRuntime,
        channels: Channels,
        meter: Meter,
        resources: ExitStack,
    ) -> None:
        self.container = container
        self.image = image
        self.hello = hello
        self.channels = channels
        self.connection = connection
        self.pending_exit = pending_exit
        self.ending: Ending | None = None
        self._runtime = runtime
        self._meter = meter
        self._resources = resources
        self._exit_code: int | None = None
        self._silent_since: float | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<Workload {self.container.id} pid={self.container.pid} exit_code={self._exit_code}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def exit_code(self) -> int | None:
        """None while it runs; then the exit code, or a ``NegativeSignal``. Never blocks.

        It is to be asked again when ``connection`` or ``pending_exit`` becomes readable, and now and then.
        """
        if self._exit_code is None:
            self._exit_code = self._ask_agent() if self._silent_since is None else None
            if self._exit_code is None:
                self._exit_code = self._ask_runtime()
            if self._exit_code is None:
                self._meter.look()
            else:
                # Its container, and the counters with it, stays until the agent hears that we hang up.
                self.ending = self._meter.ending(self._exit_code)
                self.connection.cut()
        return self._exit_code

    def _ask_agent(self) -> int | None:
        if not readable(self.connection):
            return None
        code = self.connection.exited()
        if code is None:
            self._silent_since = time.monotonic()
            self._meter.read()
            return None
        return named(code)

    def _ask_runtime(self) -> int | None:
        try:
            code = self.pending_exit.result(timeout=0).code
        except TimeoutError:
            if self._silent_since is None or time.monotonic() - self._silent_since < EXIT_REPORT_TIMEOUT:
                return None
            log.warning("The runtime did not report the end of a container", container=self.container.id)
            return named(-signal.SIGKILL)
        except IsolationError as error:
            log.warning("How a container ended can't be known", container=self.container.id, error=str(error))
            return UNKNOWN_EXIT
        # An agent that was killed itself had no word to say; its container ends as 128+n.
        return named(128 - code if 128 < code <= 128 + 64 else code)

    def send_signal(self, number: signal.Signals) -> None:
        """To the workload's process group, by way of the agent; SIGKILL goes to everyone in the container. Ended is success."""
        if self._exit_code is not None:
            return
        if number != signal.SIGKILL and self.connection.send_signal(number):
            return
        try:
            self._runtime.kill(self.container.id, number, everyone=number == signal.SIGKILL)
        except RuntimeUnreachable:
            # Without the daemon there is still the lifeline: cut, it ends the workload after the grace period.
            log.warning("The runtime can't be reached; cutting the lifeline", container=self.container.id)
            self.connection.send_signal(number)
            self._silent_since = self._silent_since or time.monotonic()
            self.connection.close()

    def close(self) -> None:
        """May be called twice."""
        if self._exit_code is not None and not self._closed:
            # The agent is ending: a container that has ended is removed at once, one that has not is killed first.
            with suppress(TimeoutError, IsolationError):
                self.pending_exit.result(timeout=AGENT_END_TIMEOUT)
        self._closed = True
        self._resources.close()


@dataclass(frozen=True, slots=True)
class RunningAgent:
    """A started container whose agent has said hello."""

    container: Container
    hello: Hello
    connection: AgentConnection
    pending_exit: PendingExit


def launch(runtime: ContainerRuntime, what: Launch, *, state_dir: Path) -> Workload:
    """Start a workload; when this fails nothing of it stays.

    :raises ContainerFailed: with the container's own output, when it ended or hung before the agent spoke.
    :raises ImageInvalid: the image has no Airflow, or another minor than the worker.
    :raises IsolationError: as ``ContainerRuntime.create`` and ``start`` do.
    """
    with ExitStack() as undo:
        started = start_agent(runtime, what, state_dir=state_dir, undo=undo)
        meter = Meter(started.container.pid)
        undo.callback(meter.close)
        channels = _hand_over(started.connection, what, undo)
        return Workload(
            container=started.container,
            image=what.image,
            hello=started.hello,
            connection=started.connection,
            pending_exit=started.pending_exit,
            runtime=runtime,
            channels=channels,
            meter=meter,
            resources=undo.pop_all(),
        )


def start_agent(runtime: ContainerRuntime, what: Launch, *, state_dir: Path, undo: ExitStack) -> RunningAgent:
    """Start a container up to its agent's hello; ``undo`` gets what takes all of it away again.

    Raises as ``launch`` does.
    """
    _prepare(state_dir)
    directory = state_dir / "workloads" / what.id
    # Python lists a directory from which it imports, and the agent has the image's uid.
    directory.mkdir(mode=0o755)
    undo.callback(shutil.rmtree, directory, ignore_errors=True)
    undo.enter_context(held(directory))
    agent.copy_to(directory)
    listener = AgentListener(directory)
    undo.callback(listener.close)

    container = runtime.create(what.id, _with_agent(what, directory))
    # ``create`` undoes itself when it fails; registered earlier, this would remove another worker's container.
    undo.callback(_remove, runtime, what.id, state_dir)
    pending_exit = runtime.wait(what.id)
    undo.callback(pending_exit.close)
    pid = runtime.start(what.id)
    try:
        connection, hello = listener.accept(pid=pid, ended=pending_exit, timeout=what.start_timeout)
    except (EndedBeforeHello, TimeoutError) as error:
        raise _silent_container(runtime, what, pending_exit, error) from error
    undo.callback(connection.close)
    # Nobody else is awaited; user code that connects finds nobody.
    listener.close()
    _check_versions(hello, what)
    log.debug("Container started", container=what.id, pid=pid, image=what.image.digest)
    return RunningAgent(replace(container, pid=pid), hello, connection, pending_exit)


def _prepare(state_dir: Path) -> None:
    """Make the state directory, which must be ours alone: whoever can rename in it could put an agent of his own there."""
    try:
        for directory in (state_dir, state_dir / "workloads"):
            directory.mkdir(parents=True, mode=0o711, exist_ok=True)
            status = directory.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
                raise ContainerFailed(
                    f"The state directory {directory} is not a directory of uid {os.geteuid()} that only it can write",
                    hint="Remove it, or set [container_runtime] state_dir to one of the worker's user alone",
                )
    except OSError as error:
        raise ContainerFailed(
            f"The worker can't make its state directory {state_dir}: {error}",
            hint="Set [container_runtime] state_dir to a place where the worker's user may write",
        ) from error


def _remove(runtime: ContainerRuntime, id: str, state_dir: Path) -> None:
    """Never raises: the workload's end is known by now, and must not be hidden behind trouble with what is left of it."""
    try:
        runtime.remove(id)
    except ContainerRuntimeError as error:
        log.warning("A container could not be removed; it will be tried again", container=id, error=str(error))
        abandon(runtime, id, state_dir=state_dir)


def _with_agent(what: Launch, directory: Path) -> ContainerSpec:
    return replace(
        what.spec,
        argv=(what.python, f"{agent.DIRECTORY}/{agent.AGENT_NAME}"),
        mounts=(*what.spec.mounts, Mount(source=str(directory.resolve()), target=agent.DIRECTORY)),
    )


def _hand_over(connection: AgentConnection, what: Launch, undo: ExitStack) -> Channels:
    ours, theirs = zip(*(socket.socketpair() for _ in range(4)), strict=True)
    for end in ours:
        undo.callback(end.close)
    try:
        connection.start(
            purpose=what.purpose,
            environment=what.environment,
            grace=what.spec.stop_grace_period,
            descriptors=theirs,
        )
    finally:
        # A copy that stayed open here would keep end-of-file from ever coming.
        for end in theirs:
            end.close()
    return Channels(*ours)


def _check_versions(hello: Hello, what: Launch) -> None:
    image = what.spec.image
    if hello.agent != agent.VERSION:
        raise ContainerFailed(f"The agent in the container has version {hello.agent}, not {agent.VERSION}")
    if hello.airflow is None:
        raise ImageInvalid(
            f"Image {image} has no Airflow that its {what.python} (Python {hello.python}) could import",
            hint=f"Install apache-airflow {_minor(what.airflow)}.* in the image, or name its interpreter with `python`",
        )
    if _minor(hello.airflow) != _minor(what.airflow):
        raise ImageInvalid(
            f"Image {image} has Airflow {hello.airflow}, this worker has {what.airflow}",
            hint=f"The minor versions must be equal: use an image with Airflow {_minor(what.airflow)}.*",
        )


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _silent_container(
    runtime: ContainerRuntime, what: Launch, pending_exit: PendingExit, error: Exception
) -> ContainerFailed:
    said = runtime.output(what.id, limit=4096).decode(errors="replace").strip()
    output = f". It printed: {said}" if said else ". It printed nothing"
    if isinstance(error, TimeoutError):
        return ContainerFailed(
            f"The agent in container {what.id} of image {what.spec.image} did not report"
            f" within {what.start_timeout:g} seconds{output}",
            hint="Raise `start_timeout` if the host is merely slow",
        )
    try:
        code = str(pending_exit.result(timeout=5).code)
    except TimeoutError:
        code = "unknown"
    return ContainerFailed(
        f"Container {what.id} of image {what.spec.image} ended with exit code {code} before the agent spoke{output}",
        hint=f"The image needs Python 3.10 or newer as {what.python}; the setting `python` names another",
    )


def readable(connection: AgentConnection) -> bool:
    """Whether there is a message, or the agent is gone."""
    if connection.fileno() < 0:
        return False
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN | select.POLLHUP)
    return bool(poll.poll(0))


def named(code: int) -> int:
    """An exit code as the supervisor wants it: minus a signal's number becomes a ``NegativeSignal``."""
    return NegativeSignal(code) if code < 0 and -code in set(signal.Signals) else code
