"""The worker's side of zygotes: finds or starts the zygote of an image, and has it fork into a container.

A zygote is a process that has imported Airflow and forks a copy of itself for each task. It belongs to no worker: the first
worker that needs it starts it, all workers of the host use it, and it ends by itself. ``<state_dir>/zygotes/<key>`` has its
socket, the directory that is mounted into it, and a record of its container and process. ``agent/zygote.py`` describes the
protocol.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import select
import shutil
import socket
import struct
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from airflow_isolation.bridge.agent_socket import not_handed_over
from airflow_isolation.bridge.descriptors import send_descriptors
from airflow_isolation.bridge.hidden_processes import hide_processes
from airflow_isolation.bridge.process_one import read_process, read_process_one
from airflow_isolation.bridge.socket_address import address_of
from airflow_isolation.bridge.started_agent import await_ready, prepare, remove_container, start_agent
from airflow_isolation.cgroups.errors import CgroupError
from airflow_isolation.cgroups.join import end_everyone_in, join_cgroups_of
from airflow_isolation.cgroups.mounted import paths_of_process
from airflow_isolation.containerd.file_lock import locked
from airflow_isolation.errors import (
    ContainerKilled,
    HostTrouble,
    IsolationError,
    RuntimeUnreachable,
)
from airflow_isolation.oci.host import host_architecture, kernel_version
from airflow_isolation.oci.identifier import new_container_id
from airflow_isolation.oci.seccomp import DEFAULT, load_profile, resolve_profile
from airflow_isolation.oci.seccomp_filter import compile_filter, filter_flags
from airflow_isolation.runtime import labels

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from airflow_isolation.bridge.pipe import Open
    from airflow_isolation.bridge.process_one import ProcessOne
    from airflow_isolation.bridge.started_agent import Launch
    from airflow_isolation.container_spec import ContainerSpec
    from airflow_isolation.runtime.interface import ContainerRuntime

log = structlog.get_logger(logger_name="airflow_isolation.zygote")

#: How long a zygote may take for one answer, in seconds. One that takes longer hangs, and is replaced.
ANSWER_TIMEOUT = 10.0

#: How long a child waits in its container for its work, in seconds. Process 1 adopts it in less time.
RELEASE_PATIENCE = 3 * ANSWER_TIMEOUT

#: Seconds after a failed start of a zygote in which workloads start fresh and no new start is tried.
RETRY_AFTER = 60.0

#: How many starts there are for one workload, without a pause, if a zygote is killed while it starts.
START_TRIES = 3

#: After so many in a row that were killed while they started, it is as if none could be started.
MOST_KILLS = 15

_SOCKET = "zygote.sock"
_UNFINISHED = "unfinished.sock"
_RECORD = "record.json"
_FAILURE = "failure"
_KILLS = "kills"
_LOCK = "lock"
_PACKET_LIMIT = 64 * 1024
#: The order in which a child enters the namespaces. The mount namespace is last, because it brings another /proc.
_ENTERED = ("ipc", "uts", "cgroup", "net", "pid", "mnt")
_CREDENTIALS = struct.Struct("3i")


class ZygoteUnavailable(Exception):
    """The zygote could not fork, and nothing runs; the workload can still be started fresh."""


class ZygoteGone(ZygoteUnavailable):
    """The zygote died during a request. The next request gets another zygote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ZygotePlan:
    """How to start a zygote. Two plans with the same ``key`` share one zygote.

    Attributes:
        launch: its container (the id is made at its start), and the environment in which it imports Airflow.
        user: the user that it becomes, whose home directory is its HOME; as in ``ContainerSpec.user``.
        drop: capabilities of its container that it gives up when it becomes ``user``.
        modules: modules to import beside Airflow's own, if the image has them.
        idle, age: it ends after so many seconds: since the last fork, since its start.
        forks: it ends after so many forks.
        memory: it ends when it has so many bytes in memory.

    """

    key: str
    launch: Launch
    user: str
    drop: frozenset[str] = frozenset()
    modules: tuple[str, ...] = ()
    idle: float = 300.0
    age: float = 3600.0
    forks: int = 10_000
    memory: int = 1024**3


@dataclass(frozen=True, slots=True, kw_only=True)
class Zygote:
    """A zygote that runs, or did a moment ago."""

    container: str
    pid: int
    directory: Path


def zygote_key(*parts: object) -> str:
    """A key for ``parts``: workloads that differ in one of them can't share a zygote."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


@contextmanager
def asking(runtime: ContainerRuntime, plan: ZygotePlan, *, state_dir: Path) -> Iterator[tuple[Zygote, socket.socket]]:
    """A connection to the plan's zygote. If there is none, one is started.

    Other workloads wait meanwhile, at most ``start_timeout`` seconds: the import takes seconds, but an import for each of them
    would take longer.

    :raises ZygoteUnavailable: it can't be started, or couldn't a moment ago.
    :raises RuntimeUnreachable: the daemon can't be reached.
    """
    directory = zygote_directory(plan, state_dir=state_dir)
    connection = _connected(directory)
    if connection is None:
        connection = _started(runtime, plan, state_dir)
    with connection:
        yield _recorded(directory), connection


def zygote_directory(plan: ZygotePlan, *, state_dir: Path) -> Path:
    """The directory of the plan's zygote, which may not exist yet."""
    return state_dir / "zygotes" / plan.key


def connect_again(key: str, *, state_dir: Path) -> socket.socket:
    """A connection to the zygote with this key. Never starts one.

    :raises ZygoteUnavailable: there is none.
    """
    connection = _connected(state_dir / "zygotes" / key)
    if connection is None:
        raise ZygoteUnavailable("the zygote has ended")
    return connection


def _connected(directory: Path) -> socket.socket | None:
    """A connection to the zygote of a directory; None when there is none, or it is dead."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        # With this the kernel names the sender of each message. Set before connecting, so that it holds for all messages.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        connection.settimeout(ANSWER_TIMEOUT)
        with address_of(directory / _SOCKET) as address:
            connection.connect(address)
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except OSError as error:
        connection.close()
        raise ZygoteUnavailable(f"the zygote at {directory} can't be reached: {error}") from error
    return connection


def _recorded(directory: Path) -> Zygote:
    try:
        record = json.loads((directory / _RECORD).read_bytes())
        return Zygote(container=record["container"], pid=record["pid"], directory=directory)
    except (OSError, ValueError, KeyError) as error:
        raise ZygoteGone(f"the record of the zygote at {directory} can't be read: {error}") from error


def _started(runtime: ContainerRuntime, plan: ZygotePlan, state_dir: Path) -> socket.socket:
    directory = zygote_directory(plan, state_dir=state_dir)
    end = time.monotonic() + plan.launch.start_timeout
    prepare(state_dir)
    try:
        with alone_in(directory, end=end, make=True):
            connection = _connected(directory)
            if connection is not None:
                return connection  # another worker was faster
            _check_no_recent_failure(directory)
            try:
                _start_again_when_killed(runtime, plan, state_dir, end=end)
            except RuntimeUnreachable:
                raise
            except (IsolationError, OSError) as error:
                # No note for a full disk, which may have room again at any time, nor for a few kills: then only this workload
                # starts fresh. But if something keeps killing zygotes, not every worker shall pay for another import.
                if not isinstance(error, HostTrouble) or _kills(directory) >= MOST_KILLS:
                    (directory / _FAILURE).write_text(str(error))
                raise ZygoteUnavailable(f"no zygote could be started: {error}") from error
            connection = _connected(directory)
    except (OSError, TimeoutError) as error:
        raise ZygoteUnavailable(f"no zygote could be started in {directory}: {error}") from error
    if connection is None:
        raise ZygoteGone("the zygote ended as soon as it had started")
    return connection


def _start_again_when_killed(runtime: ContainerRuntime, plan: ZygotePlan, state_dir: Path, *, end: float) -> None:
    directory = zygote_directory(plan, state_dir=state_dir)
    tries = START_TRIES
    while True:
        remove_zygote(runtime, directory, state_dir=state_dir)
        try:
            _start(runtime, plan, state_dir, directory)
        except ContainerKilled as error:
            with (directory / _KILLS).open("ab") as kills:
                kills.write(b".")
            tries -= 1
            if not tries or time.monotonic() >= end or _kills(directory) >= MOST_KILLS:
                raise
            log.warning("A zygote was killed while it started; starting another", why=str(error))
        else:
            (directory / _KILLS).unlink(missing_ok=True)
            return


def _kills(directory: Path) -> int:
    """How many zygotes have been killed there while they started, since one was not."""
    with suppress(FileNotFoundError):
        return (directory / _KILLS).stat().st_size
    return 0


@contextmanager
def alone_in(directory: Path, *, end: float, make: bool = False) -> Iterator[None]:
    """Lock the directory of a zygote for a block. Only its holder starts or removes a zygote.

    :param make: make the directory if it is missing. Only who starts a zygote does: who looks must not bring back what was removed.
    :raises TimeoutError: others held it until ``end``, a time of ``time.monotonic``.
    :raises OSError: it is not there, or can't be made.
    """
    with ExitStack() as held:
        while not _lock(directory, end, held, make=make):
            if time.monotonic() >= end:
                raise TimeoutError(f"{directory} is removed again and again")
        yield


def _lock(directory: Path, end: float, held: ExitStack, *, make: bool) -> bool:
    if make:
        directory.mkdir(parents=True, mode=0o700, exist_ok=True)
    with ExitStack() as taken:
        try:
            descriptor = taken.enter_context(locked(directory / _LOCK, end=end))
        except FileNotFoundError:
            if not make:
                raise
            return False
        # If we waited for a prune, we now hold the lock of a directory that is gone.
        if not os.fstat(descriptor).st_nlink:
            return False
        held.push(taken.pop_all())
        return True


def is_alive(directory: Path) -> bool:
    """Whether a zygote listens there. One that hangs counts as alive, until a workload gets no answer from it."""
    try:
        connection = _connected(directory)
    except ZygoteUnavailable:
        return True
    if connection is not None:
        connection.close()
    return connection is not None


def zygote_of(directory: Path) -> str:
    """The container's id of the zygote that was last started in a directory; empty when none is known."""
    try:
        return _recorded(directory).container
    except ZygoteUnavailable:
        return ""


def seems_dead(directory: Path) -> bool:
    """Whether the last zygote's process is gone and no worker is starting another. No zygote is asked."""
    try:
        with alone_in(directory, end=time.monotonic()):
            return not Path(f"/proc/{_recorded(directory).pid}").exists()
    except ZygoteUnavailable:
        return True
    except OSError:  # TimeoutError is one
        return False


def failed_lately(directory: Path) -> bool:
    """Whether a start failed there, and its pause is not over yet."""
    try:
        return time.time() - (directory / _FAILURE).stat().st_mtime < RETRY_AFTER
    except FileNotFoundError:
        return False


def _check_no_recent_failure(directory: Path) -> None:
    failure = directory / _FAILURE
    if failed_lately(directory):
        raise ZygoteUnavailable(f"no zygote could be started a moment ago: {failure.read_text()}")
    failure.unlink(missing_ok=True)


def _start(runtime: ContainerRuntime, plan: ZygotePlan, state_dir: Path, directory: Path) -> None:
    began = time.monotonic()
    spec = plan.launch.spec
    spec = replace(spec, labels={**spec.labels, labels.DIRECTORY: str(directory.absolute())})
    # A plan may have several zygotes, one after the other, and the last one's removal may still be due, so each has its
    # own id.
    what = replace(plan.launch, id=new_container_id("zygote"), spec=spec)
    mounted = directory / what.id
    unfinished = directory / _UNFINISHED
    with ExitStack() as undo, ExitStack() as handles:
        started = start_agent(runtime, what, state_dir=state_dir, undo=undo, directory=mounted)
        handles.callback(started.pending_exit.close)
        handles.callback(started.connection.close)
        if spec.user_namespace is None:
            # Before anything of the image is imported.
            hide_processes(started.container.pid)
        listener = handles.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        with address_of(unfinished) as address:
            listener.bind(address)
        undo.callback(unfinished.unlink, missing_ok=True)
        listener.listen(128)
        started.connection.become_zygote(
            user=plan.user,
            drop=plan.drop,
            environment=what.environment,
            modules=plan.modules,
            limits={"idle": plan.idle, "age": plan.age, "forks": plan.forks, "memory": plan.memory},
            listener=listener,
        )
        # The record is written before the answer: if this worker dies now, the next one finds the container by it.
        record = {"container": what.id, "pid": started.container.pid}
        (directory / _RECORD).write_text(json.dumps(record))
        await_ready(runtime, what, started, deadline=began + what.start_timeout, doing="be forked from")
        # Listen only now: a worker that connects during the import would take the zygote for one that hangs.
        unfinished.rename(directory / _SOCKET)
        undo.pop_all()
    log.info(
        "Zygote started",
        container=what.id,
        image=what.image.reference,
        seconds=round(time.monotonic() - began, 1),
    )


def remove_zygote(runtime: ContainerRuntime, directory: Path, *, state_dir: Path) -> None:
    """Remove the zygote of a directory, dead or alive, and its files. Running workloads don't need it. May be called twice.

    If the runtime fails to remove the container, another zygote can start all the same; the next prune removes it.
    """
    for name in (_SOCKET, _UNFINISHED):
        (directory / name).unlink(missing_ok=True)
    # Not the recorded one alone: a worker that died while it started one may have come to no record.
    for mounted in directory.glob("zygote-*"):
        remove_container(runtime, mounted.name, state_dir)
        shutil.rmtree(mounted, ignore_errors=True)
    (directory / _RECORD).unlink(missing_ok=True)


def replace_hung(runtime: ContainerRuntime, zygote: Zygote, *, state_dir: Path) -> None:
    """Remove a zygote that does not answer; the next workload starts another. A failure is logged."""
    try:
        with ExitStack() as held:
            try:
                held.enter_context(alone_in(zygote.directory, end=time.monotonic()))
            except TimeoutError:
                return  # another worker holds the lock, and removes or replaces the zygote
            if _recorded(zygote.directory) == zygote:
                remove_zygote(runtime, zygote.directory, state_dir=state_dir)
    except (OSError, ZygoteUnavailable) as error:
        log.warning("A zygote that does not answer could not be removed", container=zygote.container, error=str(error))


def fork_into(
    connection: socket.socket, pid: int, *, id: str, spec: ContainerSpec, patience: float = RELEASE_PATIENCE
) -> int:
    """Have the zygote fork into the container whose first process is ``pid``; returns the child's pid in the container.

    The child then waits for ``release``, at most ``patience`` seconds. It ends when the last copy of ``connection`` is closed
    before that. The kernel is asked what the child has become, and that is compared with the container's first process.

    :raises ZygoteUnavailable: the fork failed, for the reason given; nothing runs.
    :raises ZygoteGone: it failed because the zygote or its child has died.
    :raises IsolationError: the container's first process can't be read, or a process like it can't be made.
    :raises TimeoutError: the zygote or its child does not answer: it hangs.
    """
    first_id = spec.user_namespace.first if spec.user_namespace else 0
    one = read_process_one(pid, uid_base=first_id)
    program, flags = _filter(spec, one)
    becoming = {
        "process": {
            **one.as_message(seccomp=program, seccomp_flags=flags),
            # runc's name for the keyring of process 1. With a new keyring for each task, one user would soon have too many.
            "keyring": f"_ses.{id}",
        },
        "environment": one.environment,
        "patience": patience,
    }
    try:
        ask_to_fork(connection, pid)
        forked = _answer(connection, "forked")
        # The child may have ended, and its pid may be another process's by now.
        _check_namespace(pid, forked, "user")
        join_cgroups_of(pid, forked)
        # In a user namespace, a process in the host's network may not enter it again, so the child must not try.
        becoming["network"] = not _share_namespace(pid, forked, "net")
        connection.send(json.dumps({"go": becoming}).encode())
        child = _answer(connection, "entered")
        _check_namespaces(pid, child)
        if differences := one.differences(read_process(child, uid_base=first_id)):
            raise ZygoteUnavailable(f"the forked process is not what its container asks for: {differences}")
        return _pid_inside(child)
    except TimeoutError:
        raise
    except (BrokenPipeError, ConnectionResetError) as error:
        raise ZygoteGone(f"the zygote has ended: {error}") from error
    except OSError as error:
        raise ZygoteUnavailable(f"the zygote could not fork: {error}") from error


def ask_to_fork(connection: socket.socket, pid: int) -> None:
    """Send the first message to a zygote, with the namespaces of process ``pid``.

    They are opened here. To open them itself, the zygote would need CAP_SYS_PTRACE, and could then trace its own children.

    :raises OSError: the process or the zygote is gone.
    """
    with ExitStack() as opened:
        descriptors = []
        for kind in _ENTERED:
            descriptors.append(os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC))
            opened.callback(os.close, descriptors[-1])
        socket.send_fds(connection, [json.dumps({"fork": _ENTERED}).encode()], descriptors)


def _filter(spec: ContainerSpec, one: ProcessOne) -> tuple[bytes, int]:
    """The same seccomp filter as the container's runtime made, empty for none, and the flags to load it with."""
    profile = load_profile(spec.seccomp)
    if profile is None:
        return b"", 0
    resolved = _resolved(profile, spec.capabilities)
    return _compiled(json.dumps(resolved)), filter_flags(resolved, speculation=one.speculation)


def compile_default_filter() -> None:
    """Compile the default filter now, for this process and those that it forks. May be called twice.

    :raises IsolationError: it can't be compiled.
    """
    profile = load_profile(DEFAULT)
    if profile is not None:
        _compiled(json.dumps(_resolved(profile, frozenset())))


def _resolved(profile: Mapping[str, Any], capabilities: frozenset[str]) -> dict[str, Any]:
    return resolve_profile(
        profile,
        architecture=host_architecture(),
        capabilities=capabilities,
        kernel=kernel_version(platform.release()),
    )


@lru_cache(maxsize=16)
def _compiled(resolved: str) -> bytes:
    return compile_filter(json.loads(resolved))


def _check_namespaces(model: int, pid: int) -> None:
    """Check that process ``pid`` is in the same namespaces and cgroups as process ``model``.

    :raises ZygoteUnavailable: it is not.
    """
    for kind in (*_ENTERED, "user"):
        _check_namespace(model, pid, kind)
    if paths_of_process(model) != paths_of_process(pid):
        raise ZygoteUnavailable("the forked process is not in its container's cgroups")


def _share_namespace(one: int, other: int, kind: str) -> bool:
    return Path(f"/proc/{one}/ns/{kind}").stat().st_ino == Path(f"/proc/{other}/ns/{kind}").stat().st_ino


def _check_namespace(model: int, pid: int, kind: str) -> None:
    if not _share_namespace(model, pid, kind):
        raise ZygoteUnavailable(f"the forked process is not in its container's {kind} namespace")


def release(
    connection: socket.socket, *, environment: Mapping[str, str], purpose: str, channels: Sequence[Open]
) -> None:
    """Send the child its work. If the child has died, the container's process 1 reports it, as any workload's end.

    :raises ContainerFailed: the environment is too large for one packet.
    :raises HostTrouble: the kernel can't send it now.
    """
    packet = json.dumps({"go": {"environment": dict(environment), "purpose": purpose}}).encode()
    try:
        send_descriptors(connection, packet, (channel.fileno() for channel in channels))
    except (BrokenPipeError, ConnectionResetError):
        pass
    except OSError as error:
        raise not_handed_over(error, "a forked process", size=len(packet)) from error


def has_hung_up(connection: socket.socket) -> bool:
    """Whether the zygote or child at the other end is gone."""
    poll = select.poll()
    poll.register(connection, select.POLLHUP)
    return bool(poll.poll(0))


def end_stragglers(cgroup: Path | None) -> None:
    """Kill processes that a zygote forked and that did not become the workload: they may outlive the container.

    A failure is logged. Without a ``cgroup`` of the container's own, nothing is done. May be called twice.
    """
    if cgroup is None:
        return
    try:
        end_everyone_in(cgroup)
    except CgroupError as error:
        log.warning("Not everything that a zygote forked could be ended", error=str(error))


def _answer(connection: socket.socket, expected: str) -> int:
    """Wait for the expected answer; returns the pid, in our pid namespace, of the process that sent it."""
    packet, ancillary, _, _ = connection.recvmsg(_PACKET_LIMIT, socket.CMSG_SPACE(_CREDENTIALS.size))
    if not packet:
        raise ZygoteGone("the zygote hung up")
    try:
        message = json.loads(packet)
    except (ValueError, RecursionError) as error:
        raise ZygoteUnavailable("the zygote sent something that is not JSON") from error
    if not isinstance(message, dict) or expected not in message:
        why = message.get("failed") if isinstance(message, dict) else None
        raise ZygoteUnavailable(f"the zygote could not fork: {str(why)[:1000]}")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            pid, _, _ = _CREDENTIALS.unpack(data)
            return int(pid)
    raise ZygoteUnavailable("the kernel does not tell who answered")


def _pid_inside(pid: int) -> int:
    """The pid of a process in its own pid namespace."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("NSpid:"))
    return int(line.split()[-1])
