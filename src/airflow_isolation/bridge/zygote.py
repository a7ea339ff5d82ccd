"""The worker's side of zygotes: find the one for an image or start it, and have it fork into a container.

A zygote belongs to no worker: the first that needs it starts it, all of the host use it, and it ends by itself. What
is known of it lies in ``<state_dir>/zygotes/<key>``: its socket, the directory that is mounted into it, who it is. The
conversation is described in ``agent/zygote.py``.
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
from airflow_isolation.bridge.process_one import read_process, read_process_one
from airflow_isolation.bridge.socket_address import address_of
from airflow_isolation.bridge.started_agent import await_ready, prepare, remove_container, start_agent
from airflow_isolation.cgroups.counters import paths_of_process
from airflow_isolation.cgroups.errors import CgroupError
from airflow_isolation.cgroups.join import end_everyone_in, join_cgroups_of
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

    from airflow_isolation.bridge.pipe import Channel
    from airflow_isolation.bridge.process_one import ProcessOne
    from airflow_isolation.bridge.started_agent import Launch
    from airflow_isolation.container_spec import ContainerSpec
    from airflow_isolation.runtime.interface import ContainerRuntime

log = structlog.get_logger(logger_name="airflow_isolation.zygote")

#: How long a zygote may take for one answer, in seconds. One that takes longer hangs, and is replaced.
ANSWER_TIMEOUT = 10.0

#: How long a child waits in its container for its work, in seconds: longer than process 1 may take to adopt it.
RELEASE_PATIENCE = 3 * ANSWER_TIMEOUT

#: After a zygote could not be started, workloads start fresh for so many seconds before it is tried again.
RETRY_AFTER = 60.0

#: A zygote that is killed while it starts is started again at once, so many times for one workload.
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
#: In this order a child enters them: with the mount namespace comes another /proc, so it is the last.
_ENTERED = ("ipc", "uts", "cgroup", "net", "pid", "mnt")
_CREDENTIALS = struct.Struct("3i")


class ZygoteUnavailable(Exception):
    """Nothing has been forked that runs; the workload can still be started fresh."""


class ZygoteGone(ZygoteUnavailable):
    """It died while it was asked. Who asks again gets another one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ZygotePlan:
    """What a zygote is made of. Two plans with equal ``key`` may use the same one.

    Attributes:
        launch: its container, whose id is made when it is started, and the environment in which it imports Airflow.
        user: whose home directory its HOME is, as in ``ContainerSpec.user``.
        drop: capabilities of its container that it gives up when it becomes ``user``.
        modules: imported beside Airflow's own, where the image has them.
        idle, age: seconds until it ends: since the last fork, since its start.
        forks: after so many it ends.
        memory: bytes of it, with which it ends.

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
    """One that runs, or did a moment ago."""

    container: str
    pid: int
    directory: Path


def zygote_key(*parts: object) -> str:
    """A name for everything that one zygote can't be shared by two that differ in it."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


@contextmanager
def asking(runtime: ContainerRuntime, plan: ZygotePlan, *, state_dir: Path) -> Iterator[tuple[Zygote, socket.socket]]:
    """A connection to the plan's zygote, which is started when there is none.

    Others wait meanwhile, ``start_timeout`` seconds at most: an import takes seconds, but one for each of them would
    take longer.

    :raises ZygoteUnavailable: it can't be started, or couldn't a moment ago.
    :raises RuntimeUnreachable: the daemon is away.
    """
    directory = zygote_directory(plan, state_dir=state_dir)
    connection = _connected(directory)
    if connection is None:
        connection = _started(runtime, plan, state_dir)
    with connection:
        yield _recorded(directory), connection


def zygote_directory(plan: ZygotePlan, *, state_dir: Path) -> Path:
    """Where the plan's zygote is, or will be."""
    return state_dir / "zygotes" / plan.key


def connect_again(key: str, *, state_dir: Path) -> socket.socket:
    """A connection to the zygote of that key; none is started.

    :raises ZygoteUnavailable: there is none.
    """
    connection = _connected(state_dir / "zygotes" / key)
    if connection is None:
        raise ZygoteUnavailable("the zygote has ended")
    return connection


def _connected(directory: Path) -> socket.socket | None:
    """None when there is no zygote, or a dead one."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        # Who sends a message is then told by the kernel. Before the connection: none may come without it.
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
                # A full disk may have room at any time, and who has killed a few may not kill the next: then only this
                # workload starts fresh. Somebody who goes on killing must not have an import from each of us.
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
    """Hold the directory of a zygote: only its holder starts or removes one.

    ``make`` it when it is missing, which is for who starts one: who only looks must not bring back what was removed.

    :raises TimeoutError: others had it until ``end``, a time of ``time.monotonic``.
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
        # Who waited may have waited for a prune, and have the lock of a directory that is gone.
        if not os.fstat(descriptor).st_nlink:
            return False
        held.push(taken.pop_all())
        return True


def is_alive(directory: Path) -> bool:
    """Whether somebody listens there. One that hangs lives, until a workload finds that it does not answer."""
    try:
        connection = _connected(directory)
    except ZygoteUnavailable:
        return True
    if connection is not None:
        connection.close()
    return connection is not None


def zygote_of(directory: Path) -> str:
    """The container of the zygote that was last started in a directory; empty when none is known."""
    try:
        return _recorded(directory).container
    except ZygoteUnavailable:
        return ""


def seems_dead(directory: Path) -> bool:
    """Whether nobody starts a zygote there, and the process of the last one is gone. No zygote is asked."""
    try:
        with alone_in(directory, end=time.monotonic()):
            return not Path(f"/proc/{_recorded(directory).pid}").exists()
    except ZygoteUnavailable:
        return True
    except OSError:  # TimeoutError is one
        return False


def failed_lately(directory: Path) -> bool:
    """Whether a zygote could not be started there, and it is not to be tried again yet."""
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
    # Of a plan there may be several zygotes, one after the other, and the removal of one may be due when the next begins.
    what = replace(plan.launch, id=new_container_id("zygote"), spec=spec)
    mounted = directory / what.id
    unfinished = directory / _UNFINISHED
    with ExitStack() as undo, ExitStack() as handles:
        started = start_agent(runtime, what, state_dir=state_dir, undo=undo, directory=mounted)
        handles.callback(started.pending_exit.close)
        handles.callback(started.connection.close)
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
        # A record before the answer: should this worker die now, the next one finds the container by it.
        record = {"container": what.id, "pid": started.container.pid}
        (directory / _RECORD).write_text(json.dumps(record))
        await_ready(runtime, what, started, deadline=began + what.start_timeout, doing="be forked from")
        # Only now: who connected to one that still imports would take it for one that hangs.
        unfinished.rename(directory / _SOCKET)
        undo.pop_all()
    log.info(
        "Zygote started",
        container=what.id,
        image=what.image.reference,
        seconds=round(time.monotonic() - began, 1),
    )


def remove_zygote(runtime: ContainerRuntime, directory: Path, *, state_dir: Path) -> None:
    """Take away the zygote of a directory, dead or alive, and what is known of it. Running workloads don't need it.

    A container that the runtime does not remove now keeps nobody from starting another: the next prune does it.
    """
    for name in (_SOCKET, _UNFINISHED):
        (directory / name).unlink(missing_ok=True)
    # Not the recorded one alone: a worker that died while it started one may have come to no record.
    for mounted in directory.glob("zygote-*"):
        remove_container(runtime, mounted.name, state_dir)
        shutil.rmtree(mounted, ignore_errors=True)
    (directory / _RECORD).unlink(missing_ok=True)


def replace_hung(runtime: ContainerRuntime, zygote: Zygote, *, state_dir: Path) -> None:
    """Remove a zygote that does not answer; the next workload starts another. Trouble is logged."""
    try:
        with alone_in(zygote.directory, end=time.monotonic()):
            if _recorded(zygote.directory) == zygote:
                remove_zygote(runtime, zygote.directory, state_dir=state_dir)
    except TimeoutError:
        return  # who holds it removes or replaces that zygote
    except (OSError, ZygoteUnavailable) as error:
        log.warning("A zygote that does not answer could not be removed", container=zygote.container, error=str(error))


def fork_into(
    connection: socket.socket, pid: int, *, id: str, spec: ContainerSpec, patience: float = RELEASE_PATIENCE
) -> int:
    """Have the zygote fork into the container whose first process is ``pid``; gives the child's pid in there.

    The child then waits for ``release``, ``patience`` seconds long, and ends when the last copy of ``connection`` is
    closed before. What it has become is compared with the container's first process: nobody's word is taken for it.

    :raises ZygoteUnavailable: in words; nothing runs.
    :raises ZygoteGone: so, and it, or its child, has died.
    :raises IsolationError: what the container's first process is can't be read, or not be made again.
    :raises TimeoutError: the zygote, or its child, does not answer: it hangs.
    """
    first_id = spec.user_namespace.first if spec.user_namespace else 0
    one = read_process_one(pid, uid_base=first_id)
    program, flags = _filter(spec, one)
    becoming = {
        "process": {
            **one.as_message(seccomp=program, seccomp_flags=flags),
            # runc's name for the one that process 1 has; another for each task would soon be too many for one user.
            "keyring": f"_ses.{id}",
        },
        "environment": one.environment,
        "patience": patience,
    }
    try:
        ask_to_fork(connection, pid)
        forked = _answer(connection, "forked")
        # It may have ended, and its number be somebody else's by now.
        _check_namespace(pid, forked, "user")
        join_cgroups_of(pid, forked)
        # Who is in the host's network with a user namespace may not enter it again.
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
    """The first message to a zygote, with the namespaces of process ``pid``.

    They are opened here: the zygote would need CAP_SYS_PTRACE for that, and could then trace its own children.

    :raises OSError: the process is gone, or the zygote.
    """
    with ExitStack() as opened:
        descriptors = []
        for kind in _ENTERED:
            descriptors.append(os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC))
            opened.callback(os.close, descriptors[-1])
        socket.send_fds(connection, [json.dumps({"fork": _ENTERED}).encode()], descriptors)


def _filter(spec: ContainerSpec, one: ProcessOne) -> tuple[bytes, int]:
    """The seccomp filter that the container's runtime has made, empty for none, and the flags to load it with."""
    profile = load_profile(spec.seccomp)
    if profile is None:
        return b"", 0
    resolved = _resolved(profile, spec.capabilities)
    return _compiled(json.dumps(resolved)), filter_flags(resolved, speculation=one.speculation)


def compile_default_filter() -> None:
    """Make the filter of a container that asks for nothing special ready, for this process and those that it forks.

    :raises IsolationError: it can't be made.
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
    """:raises ZygoteUnavailable: a process is not in the same namespaces and cgroups as another."""
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
    connection: socket.socket, *, environment: Mapping[str, str], purpose: str, channels: Sequence[Channel]
) -> None:
    """Let the child run. Of one that has died the container's process 1 tells, as of any workload's end.

    :raises ContainerFailed: the environment is too large for one packet.
    :raises HostTrouble: the kernel can't send it now.
    """
    packet = json.dumps({"go": {"environment": dict(environment), "purpose": purpose}}).encode()
    try:
        socket.send_fds(connection, [packet], [channel.fileno() for channel in channels], socket.MSG_DONTWAIT)
    except (BrokenPipeError, ConnectionResetError):
        pass
    except OSError as error:
        raise not_handed_over(error, "a forked process", size=len(packet)) from error


def has_hung_up(connection: socket.socket) -> bool:
    """Whether the zygote, or the child, at the other end is gone."""
    poll = select.poll()
    poll.register(connection, select.POLLHUP)
    return bool(poll.poll(0))


def end_stragglers(cgroup: Path | None) -> None:
    """What a zygote forked and what did not become the workload; it may be outside of the container, whose end is not its own.

    Trouble is logged. Without a ``cgroup`` of the container's own nothing is done.
    """
    if cgroup is None:
        return
    try:
        end_everyone_in(cgroup)
    except CgroupError as error:
        log.warning("Not everything that a zygote forked could be ended", error=str(error))


def _answer(connection: socket.socket, expected: str) -> int:
    """The pid, in our pid namespace, of the process that gave the expected answer."""
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
