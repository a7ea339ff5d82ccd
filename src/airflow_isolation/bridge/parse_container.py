"""A container that parses DAG files, one after the other: Airflow is imported once, each file gets a fork of it.

Only one file is in it at a time. Between two files process 1 kills every other process and wipes what files could
have written; the protocol, and what it defends itself against, are described in ``agent/agent.py``.
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

#: How long process 1 may take to kill a child before the runtime is asked to kill them both, in seconds.
KILL_ESCALATION = 1.5

#: Writable by user code in every container, and not on a disk; process 1 wipes them after each file.
_SCRATCH = ("/tmp", "/dev/shm", "/dev/mqueue", "/run")  # noqa: S108 - of the container, not of the host

_KILLED: int = NegativeSignal(-signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Started:
    """The child exists: what happens from here on is the file's own doing, and its time."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The parse is over and all its processes are gone.

    Attributes:
        code: the child's exit code, or a ``NegativeSignal``; SIGKILL when the container's end was the child's.
        gone: the container itself has ended, or was given up: it can't be used again. Without a ``Started`` before it,
            the file never had its turn.
        out_of_memory: whether the kernel killed somebody in the container for want of memory; None if that is not known.

    """

    code: int
    gone: bool = False
    out_of_memory: bool | None = None


class ParseContainer:
    """One started container, ready to fork. It is used by one thread at a time; ``close`` may be called by another.

    Attributes:
        forks: how many parses have been begun in it.
        memory: bytes that process 1 occupies, as it last said.
        born: when it was ready, in seconds of ``time.monotonic``.

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
        # Held for a moment only: by news, kill and close, and by the thread of the escalation.
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
        """Readable when ``news`` has something; also while idle, when the container ends on its own."""
        return self._poll.fileno()

    def parse(
        self, *, environment: Mapping[str, str], descriptors: Sequence[Open], modules: Sequence[str] = ()
    ) -> None:
        """Begin a parse: requests, stdout, stderr, logs. Never blocks. The caller closes its copies, also after an error.

        ``modules`` of Airflow and its providers, which the file imports, are imported once for all files of this
        container. It is a help, not a promise; others than ``airflow.…`` are passed over.

        :raises ContainerFailed: the container is gone, or the environment is too large: nothing has been started.
        """
        if self._parsing:
            raise ContainerFailed(f"The container {self.container.id} is parsing another file")
        self._oom_kills_before = self._counters.oom_kills()
        self._connection.parse(environment=environment, modules=modules, descriptors=descriptors)
        self._parsing = True
        self.forks += 1

    def kill(self) -> None:
        """SIGKILL to the child and all it started. Never blocks; ended is success; ``news`` tells of the end.

        When process 1 does not do it in time, the runtime kills the container, in a thread.
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
        """What happened next, once; None when nothing did. Never blocks."""
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
        # A silent end, a word out of place, or the runtime's report of an end.
        log.info("A parse container has ended", container=self.container.id, pid=self.container.pid)
        self._stop_escalation()
        return self._ended(_KILLED, gone=True)

    def _ended(self, code: int, *, gone: bool) -> Ended:
        if gone:
            self._gone = True
            self._connection.cut()
            # Both stay readable for ever.
            self._poll.unregister(self._connection.fileno())
            self._poll.unregister(self._pending_exit.fileno())
        self._parsing = False
        before, self._oom_kills_before = self._oom_kills_before, None
        now = self._counters.oom_kills()
        return Ended(named(code), gone=gone, out_of_memory=None if before is None or now is None else now > before)

    def _stop_escalation(self) -> bool:
        """Whether it had begun: then the container is lost, whatever its agent says."""
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
        # Whether it could be killed or not, ``news`` tells that it is over, and process 1 ends as soon as it can.
        self._connection.cut()

    def close(self) -> None:
        """Remove the container. Blocks (RPC); may be called twice."""
        with self._lock:
            escalation, self._escalation = self._escalation, None
        self._connection.cut()
        if escalation is not None:
            escalation.cancel()
            escalation.join()
        self._resources.close()


def start_parse_container(runtime: ContainerRuntime, what: Launch, *, state_dir: Path) -> ParseContainer:
    """Start a container whose process 1 has imported Airflow, with ``what.environment``. Blocks; when it fails nothing stays.

    ``what.start_timeout`` is for the start and the import together.

    :raises ContainerFailed: with the container's own output, when it ended or hung before it was ready.
    :raises ImageInvalid: the image has no Airflow, another minor than the worker, or can't import it.
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
    """Which of the image's VOLUMEs are a tmpfs is the runtime's doing, so it is looked at in the container."""
    try:
        found = mounts(Path(f"/proc/{pid}/mountinfo").read_text(errors="surrogateescape")) if what.image.volumes else ()
    except OSError as error:
        raise ContainerFailed(f"The mounts of process {pid}, the container's first, can't be read: {error}") from error
    volumes = {mount.point for mount in found if mount.kind == "tmpfs"}.intersection(what.image.volumes)
    return (*scratch_directories(what.spec), *sorted(volumes - {mount.target for mount in what.spec.mounts}))


def scratch_directories(spec: ContainerSpec) -> tuple[str, ...]:
    """The directories of a container that are its alone and in memory; what the user mounted is never among them."""
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
