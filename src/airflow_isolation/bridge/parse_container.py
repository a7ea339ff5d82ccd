"""A container that parses DAG files, one after the other. Process 1 imports Airflow once, and forks a child for each file.

Only one file is in it at a time. Between two files process 1 kills every other process and removes what the file may have
written. ``agent/parse_server.py`` describes the protocol, and what it is a defence against.
"""

from __future__ import annotations

import select
import signal
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import structlog

from airflow_isolation.bridge.agent_socket import end_of
from airflow_isolation.bridge.started_agent import (
    Launch,
    NegativeSignal,
    RunningAgent,
    await_ready,
    named,
    start_agent,
)
from airflow_isolation.cgroups import counters_of_process
from airflow_isolation.cgroups.hierarchy import mounts
from airflow_isolation.errors import ContainerFailed, ContainerRuntimeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from typing_extensions import Self

    from airflow_isolation.bridge.pipe import Open
    from airflow_isolation.cgroups import Counters
    from airflow_isolation.container_spec import ContainerSpec
    from airflow_isolation.runtime.interface import ContainerRuntime

log = structlog.get_logger(logger_name="airflow_isolation.parse_container")

#: How long process 1 may take to kill a child, in seconds; after that, the runtime is asked to kill the container.
KILL_ESCALATION = 1.5

#: Directories in memory that user code can write to in every container; process 1 empties them after each file.
_SCRATCH = ("/tmp", "/dev/shm", "/dev/mqueue", "/run")  # noqa: S108 - of the container, not of the host

_KILLED: int = NegativeSignal(-signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Started:
    """The child has been forked. From now on the file is responsible for what happens, and its time counts."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The parse is over and all its processes are gone.

    Attributes:
        code: the child's exit code, or a ``NegativeSignal``; SIGKILL when the child ended with its container.
        gone: the container itself has ended, or was given up: it can't be used again. If no ``Started`` came before, the
            file's parse never began.
        out_of_memory: whether the kernel killed a process of the container because memory ran out; None if not known.

    """

    code: int
    gone: bool = False
    out_of_memory: bool | None = None


class ParseContainer:
    """One started container, ready to fork. One thread at a time may use it; another may call ``close``.

    Attributes:
        forks: how many parses have been begun in it.
        memory: bytes of process 1, as it last reported.
        born: when it became ready, in seconds of ``time.monotonic``.

    """

    def __init__(
        self,
        *,
        runtime: ContainerRuntime,
        what: Launch,
        started: RunningAgent,
        poll: select.epoll,
        counters: Counters,
        memory: int,
        resources: ExitStack,
    ) -> None:
        self.container = started.container
        self.image = what.image
        self.hello = started.hello
        self.forks = 0
        self.memory = memory
        self.born = time.monotonic()
        self._runtime = runtime
        self._connection = started.connection
        self._pending_exit = started.pending_exit
        self._resources = resources
        self._counters = counters
        self._oom_kills_before: int | None = None
        self._parsing = False
        self._gone = False
        # Held only for moments: by news, kill and close, and by the thread that escalates.
        self._lock = threading.Lock()
        self._escalation: threading.Timer | None = None
        self._given_up = False
        self._poll = poll

    def __repr__(self) -> str:
        return f"<ParseContainer {self.container.id} pid={self.container.pid} forks={self.forks}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor; readable when ``news`` has something, also when an idle container ends by itself."""
        return self._poll.fileno()

    def parse(
        self, *, environment: Mapping[str, str], descriptors: Sequence[Open], modules: Sequence[str] = ()
    ) -> None:
        """Begin a parse, with the channels requests, stdout, stderr, logs.

        Never blocks. The caller closes its copies, always.

        ``modules`` are those of Airflow and its providers that the file imports: process 1 imports them once for all files.
        If that fails, nothing is lost. Modules other than ``airflow.…`` are ignored.

        :raises ContainerFailed: the container is gone, or the environment is too large; nothing has been started.
        """
        if self._parsing:
            raise ContainerFailed(f"The container {self.container.id} is parsing another file")
        self._oom_kills_before = self._counters.oom_kills()
        self._connection.parse(environment=environment, modules=modules, descriptors=descriptors)
        self._parsing = True
        self.forks += 1

    def kill(self) -> None:
        """Send SIGKILL to the child and all that it started. Never blocks; ``news`` reports the end. May be called twice.

        If process 1 does not do it in time, a thread has the runtime kill the container.
        """
        if not self._parsing or self._escalation is not None or self._poll.closed:
            return
        heard = self._connection.send_signal(signal.SIGKILL)
        with self._lock:
            self._escalation = threading.Timer(KILL_ESCALATION if heard else 0, self._escalate)
            self._escalation.name = f"kill-{self.container.id}"
            self._escalation.daemon = True
            self._escalation.start()

    def news(self) -> Started | Ended | None:
        """The next event, each only once; None when there is none. Never blocks."""
        if self._gone or self._poll.closed:
            return None
        ready = {descriptor for descriptor, _ in self._poll.poll(0)}
        if not ready:
            return None
        if self._connection.fileno() in ready:
            said = self._connection.news() or {}
            if self._parsing and "started" in said:
                return Started()
            code = end_of(said)
            if self._parsing and code is not None:
                self.memory = _memory_in(said["exited"])
                return self._ended(code, gone=self._stop_escalation())
        # Process 1 ended silently or sent a message out of order, or the runtime reported the end.
        log.info("A parse container has ended", container=self.container.id, pid=self.container.pid)
        self._stop_escalation()
        return self._ended(_KILLED, gone=True)

    def _ended(self, code: int, *, gone: bool) -> Ended:
        if gone:
            self._gone = True
            self._connection.cut()
            # Otherwise both descriptors would stay readable for ever.
            self._poll.unregister(self._connection.fileno())
            self._poll.unregister(self._pending_exit.fileno())
        self._parsing = False
        before, self._oom_kills_before = self._oom_kills_before, None
        now = self._counters.oom_kills()
        return Ended(named(code), gone=gone, out_of_memory=None if before is None or now is None else now > before)

    def _stop_escalation(self) -> bool:
        """Stop the timer that escalates; True when it had run already: then the container is lost, whatever its agent
        says.
        """
        with self._lock:
            if self._escalation is not None:
                self._escalation.cancel()
                self._escalation = None
            return self._given_up

    def _escalate(self) -> None:
        with self._lock:
            if self._escalation is None:
                return
            self._given_up = True
        log.warning("Process 1 did not kill a parse; killing its container", container=self.container.id)
        try:
            self._runtime.kill(self.container.id, signal.SIGKILL, everyone=True)
        except (ContainerRuntimeError, ValueError) as error:
            log.warning("A parse container could not be killed", container=self.container.id, error=str(error))
        # In either case ``news`` reports the end, and process 1 ends as soon as it can.
        self._connection.cut()

    def close(self) -> None:
        """Remove the container. Blocks, because the daemon is asked; may be called twice."""
        with self._lock:
            escalation, self._escalation = self._escalation, None
        self._connection.cut()
        if escalation is not None:
            escalation.cancel()
            escalation.join()
        self._resources.close()


def start_parse_container(runtime: ContainerRuntime, what: Launch, *, state_dir: Path) -> ParseContainer:
    """Start a container, and wait until its process 1 has imported Airflow, with ``what.environment``. Blocks.

    If it fails, nothing stays. ``what.start_timeout`` is for the start and the import together.

    :raises ContainerFailed: it ended or hung before it was ready; the error has the container's own output.
    :raises ImageInvalid: the image has no Airflow, another minor version than the worker, or can't import it.
    :raises IsolationError: as ``ContainerRuntime.create`` and ``start`` do.
    """
    deadline = time.monotonic() + what.start_timeout
    with ExitStack() as undo:
        started = start_agent(runtime, what, state_dir=state_dir, undo=undo)
        counters = undo.enter_context(counters_of_process(started.container.pid))
        started.connection.serve(environment=what.environment, scratch=_scratch(what, started.container.pid))
        memory = await_ready(runtime, what, started, deadline=deadline, doing="parse DAG files")
        poll = select.epoll()
        undo.callback(poll.close)
        poll.register(started.connection.fileno(), select.EPOLLIN)
        poll.register(started.pending_exit.fileno(), select.EPOLLIN)
        return ParseContainer(
            runtime=runtime,
            what=what,
            started=started,
            poll=poll,
            counters=counters,
            memory=memory,
            resources=undo.pop_all(),
        )


def _scratch(what: Launch, pid: int) -> tuple[str, ...]:
    """The directories to empty.

    The runtime decides which VOLUMEs of the image are a tmpfs, so look at the container's mounts.
    """
    try:
        found = mounts(Path(f"/proc/{pid}/mountinfo").read_text(errors="surrogateescape")) if what.image.volumes else ()
    except OSError as error:
        raise ContainerFailed(f"The mounts of process {pid}, the container's first, can't be read: {error}") from error
    volumes = {mount.point for mount in found if mount.kind == "tmpfs"}.intersection(what.image.volumes)
    return (*scratch_directories(what.spec), *sorted(volumes - {mount.target for mount in what.spec.mounts}))


def scratch_directories(spec: ContainerSpec) -> tuple[str, ...]:
    """The directories of a container that are its own and in memory. The user's mounts are never among them."""
    binds = [mount.target for mount in spec.mounts if mount.kind == "bind"]
    tmpfs = [mount.target for mount in spec.mounts if mount.kind == "tmpfs" and not mount.read_only]
    return tuple(
        directory
        for directory in dict.fromkeys((*_SCRATCH, *tmpfs))
        if not any(PurePosixPath(directory).is_relative_to(target) for target in binds)
    )


def _memory_in(message: Mapping[str, Any]) -> int:
    match message:
        case {"memory": int(memory)} if memory >= 0:
            return memory
    return 0
