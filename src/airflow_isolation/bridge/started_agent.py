"""Starts a container whose process 1 is the agent, until its hello or its import of Airflow; and words an early end.

Tasks, parses and zygotes begin alike. The worker makes a directory with the agent and a socket. It makes the container,
begins to wait for its exit, and starts it. Then it waits for the agent's hello, the container's end or ``start_timeout``,
whichever comes first.
"""

from __future__ import annotations

import enum
import os
import select
import shutil
import signal
import stat
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from airflow_isolation import agent
from airflow_isolation.bridge.abandoned import abandon
from airflow_isolation.bridge.agent_socket import AgentConnection, AgentListener, EndedBeforeHello, Hello
from airflow_isolation.bridge.held import held
from airflow_isolation.bridge.who_killed import who_killed
from airflow_isolation.cgroups.hierarchy import mounts
from airflow_isolation.container_spec import Mount
from airflow_isolation.errors import (
    ContainerFailed,
    ContainerKilled,
    ContainerNotFound,
    ContainerRuntimeError,
    HostTrouble,
    ImageInvalid,
    IsolationError,
)
from airflow_isolation.runtime.host_trouble import writing_in
from airflow_isolation.runtime.pending_exit import UNKNOWN_EXIT

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping
    from contextlib import ExitStack

    from airflow_isolation.container_spec import ContainerSpec
    from airflow_isolation.runtime.interface import Container, ContainerRuntime, Image, PendingExit

log = structlog.get_logger(logger_name="airflow_isolation.workload")

#: How long the runtime may take to report an end, in seconds. After that, the end is reported without an exit code.
EXIT_REPORT_TIMEOUT = 5.0

#: How much of a container's output goes into an error, in bytes.
OUTPUT_TAIL = 4096

_KILLED_HINT = (
    "Somebody killed it or its shim, or the kernel did because memory ran out (code 137): look at the kernel's log,"
    " and raise the memory limit if there is a low one"
)

# How much of the agent's reason is shown, in characters: it may quote user code.
_WHY_LIMIT = 2000

#: Exit codes with a name, like psutil's negative signals. From the name Airflow's supervisor takes the signal for its
#: message, where it calls a SIGKILL a probable OOM.
NegativeSignal = enum.IntEnum(  # type: ignore[misc]  # the members are this machine's signals
    "NegativeSignal", {number.name: -number.value for number in signal.Signals}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What to start.

    Attributes:
        spec: the container, without argv and the agent's mount; both are added here.
        python: the interpreter in the image, a name on its PATH or an absolute path.
        purpose: ``task``, ``parse`` or ``zygote``.
        environment: for the workload's process only; it is not in the container's record.
        airflow: the worker's version of Airflow; the image must have the same minor version.
        start_timeout: seconds from start to hello.
        zygote: the key of the zygote that forks the workload; empty without one. The zygote has reported the image's version of
            Airflow already. So process 1 need not look for it, nor read site-packages, which halves the time to its hello.
    """

    id: str
    spec: ContainerSpec
    image: Image
    purpose: str
    environment: Mapping[str, str]
    airflow: str
    python: str = "python3"
    start_timeout: float = 60.0
    zygote: str = ""


@dataclass(frozen=True, slots=True)
class RunningAgent:
    """A started container whose agent has said hello.

    Attributes:
        waiting: the connection of a zygote's child that waits in it, and the child's pid in the container.

    """

    container: Container
    hello: Hello
    connection: AgentConnection
    pending_exit: PendingExit
    waiting: tuple[socket.socket, int] | None = None


def start_agent(
    runtime: ContainerRuntime, what: Launch, *, state_dir: Path, undo: ExitStack, directory: Path | None = None
) -> RunningAgent:
    """Start a container, and wait for its agent's hello. ``undo`` gets the functions that remove all of it again.

    ``directory`` is mounted into it; by default it is in ``<state_dir>/workloads``. It is made if it is missing.

    :raises ContainerFailed: the container ended or hung before the hello (the error has its output), or a mount is not
        idmapped as asked.
    :raises HostTrouble: the state directory can't be written, or the container was killed from outside before the hello.
    :raises ImageInvalid: the image has no Airflow, or another minor version than the worker.
    :raises IsolationError: as ``ContainerRuntime.create`` and ``start``.
    """
    prepare(state_dir)
    with writing_in(state_dir):
        if directory is None:
            directory = state_dir / "workloads" / what.id
            directory.mkdir()
            undo.callback(shutil.rmtree, directory, ignore_errors=True)
            undo.enter_context(held(directory))
        else:
            directory.mkdir(exist_ok=True)
            undo.callback(shutil.rmtree, directory, ignore_errors=True)
        # Readable for all, whatever the umask: Python lists directories from which it imports, and the agent has the
        # image's uid.
        directory.chmod(0o755)
        agent.copy_to(directory)
        listener = AgentListener(directory)
    undo.callback(listener.close)

    container = runtime.create(what.id, _with_agent(what, directory))
    # Registered after ``create``, which undoes itself when it fails. Earlier, this could remove another worker's container.
    undo.callback(remove_container, runtime, what.id, state_dir)
    try:
        pending_exit = runtime.wait(what.id)
        undo.callback(pending_exit.close)
        pid = runtime.start(what.id)
    except ContainerNotFound as error:
        raise ContainerKilled(f"The container was taken away before it started: {error}") from error
    try:
        connection, hello = listener.accept(pid=pid, ended=pending_exit, timeout=what.start_timeout)
    except (EndedBeforeHello, TimeoutError) as error:
        raise _silent_container(runtime, what, pending_exit, error) from error
    undo.callback(connection.close)
    # No other connection is expected, so user code must find no listener.
    listener.close()
    _check_versions(hello, what)
    _check_idmapped(what.spec, pid)
    log.debug("Container started", container=what.id, pid=pid, image=what.image.digest)
    return RunningAgent(replace(container, pid=pid), hello, connection, pending_exit)


def prepare(state_dir: Path) -> None:
    """Make the state directory. Only this user may write to it: others could replace the agent in it. May be called twice.

    :raises HostTrouble: it can't be made, or another user may write to it.
    """
    with writing_in(state_dir):
        for directory in (state_dir, state_dir / "workloads"):
            directory.mkdir(parents=True, mode=0o711, exist_ok=True)
            status = directory.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
                raise HostTrouble(
                    f"The state directory {directory} is not a directory of uid {os.geteuid()} that only it can write",
                    hint="Remove it, or set [container_runtime] state_dir to one of the worker's user alone",
                )


def remove_container(runtime: ContainerRuntime, id: str, state_dir: Path) -> None:
    """Remove a container after its workload's end. Never raises, so that a failure doesn't hide how the workload ended."""
    try:
        runtime.remove(id)
    except ContainerRuntimeError as error:
        log.warning("A container could not be removed; it will be tried again", container=id, error=str(error))
        with suppress(OSError):  # a full disk: without a note, it is removed after this worker's end
            abandon(runtime, id, state_dir=state_dir)


def _with_agent(what: Launch, directory: Path) -> ContainerSpec:
    return replace(
        what.spec,
        argv=(what.python, *(("-S",) if what.zygote else ()), f"{agent.DIRECTORY}/{agent.AGENT_NAME}"),
        mounts=(*what.spec.mounts, Mount(source=str(directory.resolve()), target=agent.DIRECTORY)),
    )


def _check_versions(hello: Hello, what: Launch) -> None:
    image = what.spec.image
    if hello.agent != agent.VERSION:
        raise ContainerFailed(f"The agent in the container has version {hello.agent}, not {agent.VERSION}")
    if what.zygote:
        return
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


def _check_idmapped(spec: ContainerSpec, pid: int) -> None:
    """Check the container's mounts: a runtime that doesn't know idmapped mounts ignores them silently.

    No user code has run yet.
    """
    wanted = {mount.target for mount in spec.mounts if mount.idmapped} if spec.user_namespace is not None else set()
    if not wanted:
        return
    try:
        found = mounts(Path(f"/proc/{pid}/mountinfo").read_text(errors="surrogateescape"))
    except OSError as error:
        raise ContainerFailed(f"The mounts of process {pid}, the container's first, can't be read: {error}") from error
    # The last mount at a place covers the others.
    options = {mount.point: mount.options for mount in found}
    if missing := sorted(target for target in wanted if "idmapped" not in options.get(target, ())):
        raise ContainerFailed(
            f"The runtime did not map the ids of the volume {missing[0]}, whose files would change owner",
            hint="Set [containerd_runtime] runtime_binary to the runtime that can, by its path",
        )


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _silent_container(
    runtime: ContainerRuntime, what: Launch, pending_exit: PendingExit, error: Exception
) -> ContainerFailed:
    output = _printed(runtime, what)
    if isinstance(error, TimeoutError):
        return ContainerFailed(
            f"The agent in container {what.id} of image {what.spec.image} did not report"
            f" within {what.start_timeout:g} seconds{output}",
            hint="Raise `start_timeout` if the host is merely slow",
        )
    code = _exit_code(pending_exit)
    sentence = (
        f"Container {what.id} of image {what.spec.image} ended with {_in_words(code)} before the agent spoke{output}"
    )
    if _was_killed(code):
        return ContainerKilled(sentence, hint=who_killed(runtime, what.id) or _KILLED_HINT)
    return ContainerFailed(
        sentence, hint=f"The image needs Python 3.10 or newer as {what.python}; the setting `python` names another"
    )


def await_ready(runtime: ContainerRuntime, what: Launch, started: RunningAgent, *, deadline: float, doing: str) -> int:
    """Wait until process 1 has imported Airflow; returns its size in bytes. ``doing`` completes "can't …".

    :raises ContainerFailed: it was not ready before ``deadline`` (a time of ``time.monotonic``), or it ended.
    :raises ImageInvalid: the image's Airflow can't be imported.
    """
    poll = select.poll()
    poll.register(started.connection.fileno(), select.POLLIN)
    poll.register(started.pending_exit.fileno(), select.POLLIN)
    hung = not poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
    said: dict[str, Any] | None = started.connection.news() if readable(started.connection) else None
    match said:
        case {"ready": {"memory": int(memory)}}:
            return memory
        case {"unable": {"why": str(why)}}:
            _exit_code(started.pending_exit)  # wait for its end, so that all its output is there
            raise ImageInvalid(
                f"Image {what.spec.image} can't {doing}: {why[:_WHY_LIMIT]}{_printed(runtime, what)}",
                hint=f"Try `{what.python} -c 'import airflow.dag_processing.processor'` in the image",
            )
    raise _not_ready(runtime, what, started, hung=hung)


def _not_ready(runtime: ContainerRuntime, what: Launch, started: RunningAgent, *, hung: bool) -> ContainerFailed:
    code = None if hung else _exit_code(started.pending_exit)
    output = _printed(runtime, what)
    container = f"container {what.id} of image {what.spec.image}"
    if hung:
        return ContainerFailed(
            f"Airflow was not imported in {container} within {what.start_timeout:g} seconds{output}",
            hint="Raise `start_timeout` if the host is merely slow",
        )
    sentence = f"The {container} ended with {_in_words(code)} while it imported Airflow{output}"
    if _was_killed(code):
        return ContainerKilled(sentence, hint=who_killed(runtime, what.id) or _KILLED_HINT)
    return ContainerFailed(sentence)


def _exit_code(pending_exit: PendingExit) -> int | None:
    with suppress(TimeoutError, IsolationError):
        return pending_exit.result(timeout=EXIT_REPORT_TIMEOUT).code
    return None


def _was_killed(code: int | None) -> bool:
    """Whether a signal ended it; also when the code is not known, because its shim was killed."""
    return code is None or code == UNKNOWN_EXIT or 128 < code <= 128 + signal.NSIG


def _in_words(code: int | None) -> str:
    if code is None or code == UNKNOWN_EXIT:
        return "an unknown exit code"
    return f"exit code {code}"


def _printed(runtime: ContainerRuntime, what: Launch) -> str:
    said = runtime.output(what.id, limit=OUTPUT_TAIL).decode(errors="replace").strip()
    return f". It printed: {said}" if said else ". It printed nothing"


def readable(connection: AgentConnection) -> bool:
    """Whether there is a message, or the agent is gone."""
    if connection.fileno() < 0:
        return False
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN | select.POLLHUP)
    return bool(poll.poll(0))


def named(code: int) -> int:
    """An exit code for the supervisor: minus a signal's number becomes a ``NegativeSignal``."""
    return NegativeSignal(code) if code < 0 and -code in set(signal.Signals) else code
