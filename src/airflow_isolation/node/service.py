"""The node: one event loop that answers workers, and threads for what waits for the daemon.

Each connection is one workload's. The loop never blocks: it takes one packet of one worker a turn, and what a worker does
not read is not kept for it. A worker that hangs, floods or lies ends its own connection alone.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import structlog

from airflow_isolation.bridge.socket_address import address_of
from airflow_isolation.bridge.who_killed import who_killed
from airflow_isolation.errors import ContainerNotFound, ContainerRuntimeError, HostTrouble, IsolationError
from airflow_isolation.node.admission import Admission, Demand
from airflow_isolation.node.clients import client_of, is_allowed
from airflow_isolation.node.protocol import VERSION, HungUp, Malformed, Packet, receive, send, told
from airflow_isolation.node.request import StartRequest
from airflow_isolation.node.start import Kept, make_ready, resume, start
from airflow_isolation.runtime import labels
from airflow_isolation.runtime.interface import ContainerState

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence
    from pathlib import Path

    from airflow_isolation.bridge.workload import Begun
    from airflow_isolation.node.admission import Capacity, Turn
    from airflow_isolation.node.clients import Client
    from airflow_isolation.node.start import Host
    from airflow_isolation.runtime.interface import Container
    from airflow_isolation.settings.effective import EffectiveSettings

log = structlog.get_logger(logger_name="airflow_isolation.node")

_T = TypeVar("_T")

#: Connections of one user at a time; each is a running task.
MOST_CONNECTIONS: Final = 4096
#: Starts of one user at a time; the others wait for their turn.
MOST_STARTS: Final = 32
_STARTING_THREADS: Final = 64
#: Of their own: a pull may take minutes, and a kill must not wait for it.
_THREADS: Final = 16
#: The kernel's own bound (net.core.somaxconn): a client that does not wait is turned away by a full queue.
_BACKLOG: Final = 4096
#: What has been begun may take so long when the node is told to end, in seconds.
_END_SECONDS: Final = 30.0
#: How long a worker that has connected may say nothing, in seconds.
FIRST_WORD_SECONDS: Final = 10.0
#: How often a worker that waits for its start is told that the node lives, in seconds.
SIGN_OF_LIFE: Final = 5.0
#: How often what has no worker any more is looked at, in seconds.
LOOK_SECONDS: Final = 10.0
#: How long a container that has ended waits for its worker after a restart of the node, in seconds.
ORPHAN_SECONDS: Final = 60.0
#: How long an agent that has said its last word may take to end, in seconds.
_AGENT_END_SECONDS: Final = 1.0
#: How long nobody is let in when the kernel lets nobody in, in seconds.
_ACCEPT_PAUSE_SECONDS: Final = 1.0


@dataclass(eq=False)
class _Line:
    """A connection and what has come of it. Only the loop's thread touches it."""

    connection: socket.socket
    client: Client
    since: float = field(default_factory=time.monotonic)
    kept: Kept | None = None
    turn: Turn | None = None
    is_busy: bool = False
    is_closed: bool = False
    exit_watched: bool = False

    def fileno(self) -> int:
        return self.connection.fileno()


class Node:
    """Serves at one socket until it is told to end. Nothing of it may be used twice."""

    def __init__(self, host: Host, *, clients: Sequence[str], capacity: Capacity, admission_timeout: float) -> None:
        self._host = host
        self._clients = clients
        self._admission = Admission(capacity)
        self._admission_timeout = admission_timeout
        #: Of what runs, by the ids of containers.
        self._turns: dict[str, Turn] = {}
        self._lines: set[_Line] = set()
        self._starting: dict[int, asyncio.Semaphore] = {}
        self._orphans: dict[str, float] = {}
        self._has_looked_back = False
        self._jobs: set[asyncio.Task[None]] = set()
        self._starters = ThreadPoolExecutor(_STARTING_THREADS, thread_name_prefix="node-start")
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="node")
        self._loop: asyncio.AbstractEventLoop

    def serve(self, listener: socket.socket, *, ready: Callable[[], object] = lambda: None) -> None:
        """Answer whoever connects to ``listener``, until SIGTERM or SIGINT. Tasks run on when it ends.

        ``ready`` is called when the first may connect.
        """
        asyncio.run(self._serve(listener, ready))

    async def _serve(self, listener: socket.socket, ready: Callable[[], object]) -> None:
        self._loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, ended.set)
        listener.setblocking(False)
        self._found(await self._in_thread(self._look_back))
        self._loop.add_reader(listener, self._accept, listener)
        looking = self._loop.create_task(self._look())
        ready()
        try:
            await ended.wait()
        finally:
            self._loop.remove_reader(listener)
            looking.cancel()
            for line in tuple(self._lines):
                self._forget(line)
            if self._jobs:
                await asyncio.wait(self._jobs, timeout=_END_SECONDS)
            for threads in (self._starters, self._threads):
                threads.shutdown(wait=False, cancel_futures=True)

    # --- connections

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # Such as too many open files: asked again at once, the loop would do nothing else.
            log.warning("No worker can connect now", error=str(error))
            self._loop.remove_reader(listener)
            self._loop.call_later(_ACCEPT_PAUSE_SECONDS, self._loop.add_reader, listener, self._accept, listener)
            return
        connection.setblocking(False)
        try:
            client = client_of(connection)
        except OSError as error:
            log.warning("Who has connected can't be told", error=str(error))
            connection.close()
            return
        line = _Line(connection, client)
        if why := self._why_not(client):
            log.warning("Refused a connection", client=str(client), why=why)
            self._tell(
                line,
                {
                    "failed": told(
                        IsolationError(why, hint="See docs/node.md; [container_runtime] node_clients says who may ask")
                    )
                },
            )
            connection.close()
            return
        self._lines.add(line)
        self._loop.add_reader(connection, self._readable, line)

    def _why_not(self, client: Client) -> str:
        if not is_allowed(client, self._clients):
            return f"The node does not serve uid {client.uid}"
        if not client.pid:
            return "The node can't see this process, and so not when it ends: it must be in the host's pid namespace"
        if Counter(line.client.uid for line in self._lines)[client.uid] >= MOST_CONNECTIONS:
            return f"The user with uid {client.uid} has {MOST_CONNECTIONS} connections to the node already"
        return ""

    def _readable(self, line: _Line) -> None:
        try:
            packet = receive(line.connection)
        except BlockingIOError:
            return
        except HungUp:
            self._hung_up(line)
            return
        except Malformed as error:
            self._refuse(line, error)
            return
        try:
            owned = self._answer(line, packet)
        except Malformed as error:
            owned = False
            self._refuse(line, error)
        if not owned:
            packet.close()

    def _answer(self, line: _Line, packet: Packet) -> bool:
        """Whether a job has the packet's descriptors now.

        :raises Malformed: the message makes no sense, or not now.
        """
        message = packet.message
        if line.is_busy:
            raise Malformed("a worker must wait for an answer before it asks again")
        if line.kept is None:
            if message.get("version") != VERSION:
                raise Malformed(
                    f"the worker speaks version {message.get('version')!r:.20} of the node's protocol, and the node {VERSION}",
                    hint="Install the same release of airflow-isolation for workers and node",
                )
            return self._first(line, packet)
        match message:
            case {"kill": {"signal": int(number), "everyone": bool(everyone)}} if number in set(signal.Signals):
                self._job(line, self._kill(line, line.kept, signal.Signals(number), everyone=everyone))
            case {"ended": {"code": int(code), "by_others": bool(by_others)}} if -64 <= code <= 255:
                self._job(line, self._ended(line, line.kept, code, by_others=by_others))
            case {"begun": _}:
                if line.kept.slot is not None:
                    line.kept.slot.close()
            case {"remove": _}:
                kept, line.kept = line.kept, None
                self._unwatch(line, kept)
                self._release(kept, patience=0.0)
                self._forget(line)
            case _:
                raise Malformed("a packet is no message of a worker whose task runs")
        return False

    def _first(self, line: _Line, packet: Packet) -> bool:
        match packet.message:
            case {"start": request}:
                asked = StartRequest.of_message(request)
                self._job(line, self._start(line, asked, packet))
                return True
            case {"resume": {"container": str(id)}} if len(id) <= 128:
                self._job(line, self._resume(line, id))
                return False
        raise Malformed("a worker's first packet must be start or resume")

    # --- jobs: they wait for threads, and never for a worker

    def _job(self, line: _Line, job: Coroutine[Any, Any, None]) -> None:
        line.is_busy = True

        async def done() -> None:
            try:
                await job
            except IsolationError as error:
                self._tell(line, {"failed": told(error)})
            except Exception as error:
                log.exception("A job of the node failed", client=str(line.client))
                self._tell(line, {"failed": told(HostTrouble(f"The node failed: {error}", hint="Look at its log"))})
            finally:
                line.is_busy = False
                if line.kept is None:
                    self._forget(line)
                elif line.is_closed:
                    self._left_alone(line, line.kept)

        self._do(done())

    def _do(self, job: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(job)
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)

    async def _in_thread(self, call: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        return await self._loop.run_in_executor(self._threads, partial(call, *arguments, **keywords))

    async def _start(self, line: _Line, request: StartRequest, packet: Packet) -> None:
        began = self._loop.time()
        with ExitStack() as undo:
            undo.callback(packet.close)
            ready = await self._in_turn(line, make_ready, self._host, request, line.client, packet.descriptors)
            if ready is None:
                return
            line.turn = self._admission.ask(f"{request.dag_id}.{request.task_id}", ready.demand)
            undo.callback(line.turn.release)
            # What the worker's Airflow lets a queued task wait, for the pull and for this.
            seconds = max(0.0, min(self._admission_timeout, request.pull_timeout - (self._loop.time() - began)))
            if not await self._admission.wait(
                line.turn, seconds=seconds, tell=lambda why: self._tell(line, {"waiting": {"why": why}})
            ):
                return
            begun = await self._in_turn(line, start, self._host, ready)
            if begun is None:
                return
            undo.pop_all()
        packet.close()
        self._turns[begun.container.id] = line.turn
        line.kept = Kept(begun.container.id, begun.pending_exit, begun.meter, begun.resources, begun.slot)
        try:
            if not line.is_closed:
                self._tell(line, {"started": _started(begun, ready.settings)}, (begun.connection.fileno(),))
        finally:
            # Now the worker has the lifeline, and nobody else.
            begun.connection.close()
        self._watch(line, line.kept)

    async def _in_turn(self, line: _Line, work: Callable[..., _T], *arguments: Any) -> _T | None:
        """What ``work`` gives, in a thread, when its user has not too much under way; None for a worker that is gone."""
        async with self._starting.setdefault(line.client.uid, asyncio.Semaphore(MOST_STARTS)):
            if line.is_closed:
                return None
            return await self._loop.run_in_executor(self._starters, partial(work, *arguments))

    async def _resume(self, line: _Line, id: str) -> None:
        line.kept = await self._in_thread(resume, self._host, id, line.client)
        self._orphans.pop(id, None)
        self._tell(line, {"resumed": {}})
        self._watch(line, line.kept)

    async def _kill(self, line: _Line, kept: Kept, number: signal.Signals, *, everyone: bool) -> None:
        await self._in_thread(self._host.behind.runtime.kill, kept.id, number, everyone=everyone)
        self._tell(line, {"killed": {}})

    async def _ended(self, line: _Line, kept: Kept, code: int, *, by_others: bool) -> None:
        self._unwatch(line, kept)
        who = partial(who_killed, self._host.behind.runtime, kept.id)
        ending = await self._in_thread(kept.meter.ending, code, by_others=by_others, who=who)
        self._tell(line, {"ending": {**asdict(ending), "code": int(ending.code)}})
        line.kept = None
        # Its container, and the counters with it, stays until the agent hears that the worker has hung up.
        self._release(kept, patience=_AGENT_END_SECONDS)

    # --- ends

    def _watch(self, line: _Line, kept: Kept) -> None:
        line.exit_watched = True
        self._loop.add_reader(kept.pending_exit.fileno(), self._container_ended, line, kept)

    def _unwatch(self, line: _Line, kept: Kept) -> None:
        if line.exit_watched:
            line.exit_watched = False
            self._loop.remove_reader(kept.pending_exit.fileno())

    def _container_ended(self, line: _Line, kept: Kept) -> None:
        self._unwatch(line, kept)
        if line.is_closed:
            line.kept = None
            self._release(kept, patience=0.0)
            return
        try:
            code = kept.pending_exit.result(timeout=0).code
        except (TimeoutError, IsolationError) as error:
            self._tell(line, {"exit": {"unknown": str(error)}})
        else:
            self._tell(line, {"exit": {"code": code}})

    def _left_alone(self, line: _Line, kept: Kept) -> None:
        """Its worker is gone, and the lifeline with it: the agent ends the task, and then the rest goes."""
        if not line.exit_watched:
            self._watch(line, kept)

    def _release(self, kept: Kept, *, patience: float) -> None:
        def release() -> None:
            # A container that has ended is removed at once, one that has not is killed first.
            with suppress(TimeoutError, IsolationError):
                kept.pending_exit.result(timeout=patience)
            kept.resources.close()

        async def gone() -> None:
            try:
                await self._in_thread(release)
            finally:
                self._make_room(kept.id)

        self._do(gone())

    def _make_room(self, id: str) -> None:
        """For others, when a container is gone."""
        turn = self._turns.pop(id, None)
        if turn is not None:
            turn.release()

    def _hung_up(self, line: _Line) -> None:
        self._forget(line)
        if line.kept is not None and not line.is_busy:
            self._left_alone(line, line.kept)

    def _refuse(self, line: _Line, error: Malformed) -> None:
        log.warning("A worker was refused", client=str(line.client), why=str(error))
        self._tell(line, {"failed": told(error)})
        self._hung_up(line)

    def _forget(self, line: _Line) -> None:
        if not line.is_closed:
            line.is_closed = True
            if line.turn is not None and not line.turn.answer.done():
                line.turn.release()
            self._loop.remove_reader(line.connection)
            line.connection.close()
            self._lines.discard(line)

    def _tell(self, line: _Line, message: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
        if line.is_closed:
            return
        try:
            send(line.connection, message, descriptors)
        except (HungUp, Malformed) as error:
            log.warning("A worker does not listen", client=str(line.client), why=str(error))
            if line in self._lines:
                self._hung_up(line)

    # --- what nobody asks for

    async def _look(self) -> None:
        """Ends the silent, tells the patient that it lives, and looks at what has no worker."""
        looked = time.monotonic()
        told_at = looked
        while True:
            await asyncio.sleep(1.0)
            now = time.monotonic()
            for line in tuple(self._lines):
                if line.kept is not None:
                    line.kept.meter.look()
                elif not line.is_busy and now - line.since > FIRST_WORD_SECONDS:
                    self._refuse(line, Malformed(f"nothing was asked for within {FIRST_WORD_SECONDS:g} seconds"))
                elif line.is_busy and now - told_at > SIGN_OF_LIFE:
                    self._tell(line, {"busy": {}})
            if now - told_at > SIGN_OF_LIFE:
                told_at = now
            if now - looked > LOOK_SECONDS:
                looked = now
                try:
                    if not self._has_looked_back:
                        self._found(await self._in_thread(self._look_back))
                    for id in await self._in_thread(self._tidy_up):
                        self._make_room(id)
                except (IsolationError, OSError) as error:
                    log.warning("The node could not tidy up", error=str(error))

    def _look_back(self) -> Sequence[Container]:
        """The tasks of this host. Never raises: while the daemon is away, it is tried again later."""
        try:
            found = self._host.behind.runtime.list({labels.PURPOSE: "task"})
        except (IsolationError, OSError) as error:
            log.warning("What another node has left can't be looked at yet", error=str(error))
            return ()
        self._has_looked_back = True
        return tuple(one for one in found if labels.CLIENT in one.labels)

    def _found(self, containers: Sequence[Container]) -> None:
        """Each has its place on this host. Those of no worker here are removed when none resumes them."""
        now = time.monotonic()
        mine = {line.kept.id for line in self._lines if line.kept is not None}
        for one in containers:
            if one.id not in mine:
                self._orphans[one.id] = now
            if one.id not in self._turns:
                name = f"{one.labels.get(labels.DAG_ID, '')}.{one.labels.get(labels.TASK_ID, '')}"
                demand = Demand.parse(one.labels.get(labels.DEMAND, ""))
                self._turns[one.id] = self._admission.occupy(name, demand)

    def _tidy_up(self) -> Sequence[str]:
        """The containers without a worker that run no more. Each is removed when its worker has had time to come back."""
        self._host.trees.release_idle()
        ended = []
        now = time.monotonic()
        for id, since in tuple(self._orphans.items()):
            try:
                if self._host.behind.runtime.get(id).state is ContainerState.RUNNING:
                    continue
                ended.append(id)
                if now - since < ORPHAN_SECONDS:
                    continue
                self._host.behind.runtime.remove(id)
            except ContainerNotFound:
                ended.append(id)
            except ContainerRuntimeError as error:
                log.warning("A container whose worker is gone could not be removed", container=id, error=str(error))
                continue
            self._orphans.pop(id, None)
        return ended


def _started(begun: Begun, settings: EffectiveSettings) -> dict[str, Any]:
    permissions = settings.permissions
    return {
        "container": begun.container.id,
        "pid": begun.container.pid,
        "image": {"reference": settings.image, "digest": begun.image.digest},
        "hello": asdict(begun.hello),
        "start_mode": begun.start_mode,
        "why_fresh": begun.why_fresh,
        "has_slot": begun.slot is not None,
        "grace": settings.stop_grace_period,
        "permissions": {
            one.name: [[grant.file, grant.id] for grant in getattr(permissions, one.name)]
            for one in fields(permissions)
        },
        "volumes": [[volume.source, volume.target] for volume in settings.volumes],
    }


def listen(path: Path) -> socket.socket:
    """The node's socket, which whoever is allowed may connect to; who that is, is asked of the kernel.

    A socket that a killed node has left is replaced; ``close`` the result, and remove the path.

    :raises HostTrouble: another node listens there, or something else than a socket is there.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        _make_room(path)
        with address_of(path) as address:
            listener.bind(address)
        path.chmod(0o666)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise HostTrouble(
            f"The node can't listen at {path}: {error}", hint="Correct [container_runtime] node"
        ) from error
    except BaseException:
        listener.close()
        raise
    return listener


def _make_room(path: Path) -> None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.geteuid():
        raise HostTrouble(f"{path} is there, and is no socket of this node's user", hint="Move it away")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other, address_of(path) as address:
        other.settimeout(1.0)
        try:
            other.connect(address)
        except ConnectionRefusedError:
            path.unlink()
            return
    raise HostTrouble(f"Another node listens at {path}", hint="One is enough for a host; end it, or leave it be")
