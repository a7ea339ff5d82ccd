"""A workload in its container, from nothing to gone.

1. a directory ``<state_dir>/workloads/<id>`` with the agent and the socket on which it is awaited
2. the container, created and started; its exit is asked for before it starts
3. the agent's hello, raced against the container's end and ``start_timeout``
4. the hand-over of the four descriptors; from then on supervisor and workload talk directly
5. the end: the agent's word, or else the runtime's; a last look at the counters of the container's cgroup
6. the release of all of it, in reverse
"""

from __future__ import annotations

import math
import signal
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from fcntl import ioctl
from functools import partial
from termios import TIOCOUTQ
from typing import TYPE_CHECKING, Literal, Protocol

import structlog

from airflow_isolation.bridge import zygote
from airflow_isolation.bridge.ending import Meter
from airflow_isolation.bridge.fresh_slot import await_slot
from airflow_isolation.bridge.pipe import open_channels
from airflow_isolation.bridge.spare import claim, make_ones_own
from airflow_isolation.bridge.started_agent import Launch, RunningAgent, named, readable, start_agent
from airflow_isolation.bridge.who_killed import who_killed
from airflow_isolation.bridge.zygote import ZygoteGone, ZygotePlan, ZygoteUnavailable
from airflow_isolation.cgroups.join import own_cgroup_of
from airflow_isolation.errors import (
    ContainerFailed,
    ContainerKilled,
    HostTrouble,
    IsolationError,
    RuntimeUnreachable,
    SpecRefused,
)
from airflow_isolation.oci.identifier import new_container_id
from airflow_isolation.runtime.pending_exit import UNKNOWN_EXIT

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from typing_extensions import Self

    from airflow_isolation.bridge.agent_socket import AgentConnection, Hello
    from airflow_isolation.bridge.ending import Ending
    from airflow_isolation.bridge.pipe import Channels, Open
    from airflow_isolation.runtime.interface import Container, ContainerRuntime, Image, PendingExit

log = structlog.get_logger(logger_name="airflow_isolation.workload")

#: How long the runtime may take to report an end that the agent's silence announces, in seconds.
EXIT_REPORT_TIMEOUT = 20.0

#: How long an agent that has said its last word may take to end, in seconds.
AGENT_END_TIMEOUT = 1.0

#: Of how many zygotes, one after the other, a workload asks to be forked.
FORK_TRIES = 3


StartMode = Literal["fork", "fresh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A workload that has its work and runs.

    Attributes:
        resources: releases all of it, but the supervisor's side of its channels.
        slot: one of the host's few for a fresh start, until it has begun.
        start_mode: how it was started.
        why_fresh: why it could not be forked, although it was to be.

    """

    container: Container
    image: Image
    hello: Hello
    connection: AgentConnection
    pending_exit: PendingExit
    meter: Meter
    resources: ExitStack
    start_mode: StartMode = "fresh"
    why_fresh: str = ""
    slot: ExitStack | None = None


class Meters(Protocol):
    """As ``Meter``, which reads the counters of a container on this host."""

    def look(self) -> None: ...
    def read(self) -> None: ...
    def ending(self, code: int, *, by_others: bool = False, who: Callable[[], str] = str) -> Ending: ...


class Kills(Protocol):
    """What ``Workload`` asks a runtime for."""

    def kill(self, id: str, signal: signal.Signals = signal.SIGKILL, *, everyone: bool = False) -> None: ...
    def signals_asked_for(self, id: str) -> tuple[signal.Signals, ...]: ...


class Workload:
    """A started workload. ``close`` releases everything, whether it has ended or not.

    Attributes:
        start_mode: how it was started.
        why_fresh: why it could not be forked, although it was to be.
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
        runtime: Kills,
        channels: Channels,
        meter: Meters,
        resources: ExitStack,
        start_mode: StartMode = "fresh",
        why_fresh: str = "",
        slot: ExitStack | None = None,
    ) -> None:
        self.container = container
        self.image = image
        self.hello = hello
        self.channels = channels
        self.connection = connection
        self.pending_exit = pending_exit
        self.start_mode = start_mode
        self.why_fresh = why_fresh
        self.ending: Ending | None = None
        self._runtime = runtime
        self._meter = meter
        self._slot = slot
        self._resources = resources
        self._exit_code: int | None = None
        self._silent_since: float | None = None
        self._signalled = False
        self._killed_by_us = False
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
        if self._slot is not None and (self._exit_code is not None or self._has_begun()):
            self._slot.close()
            self._slot = None
        if self._exit_code is None:
            self._exit_code = self._ask_agent() if self._silent_since is None else None
            if self._exit_code is None:
                self._exit_code = self._ask_runtime()
            if self._exit_code is None:
                self._meter.look()
            else:
                # Its container, and the counters with it, stays until the agent hears that we hang up.
                by_others = self._silent_since is not None and not self._killed_by_us
                self.ending = self._meter.ending(
                    self._exit_code, by_others=by_others, who=partial(who_killed, self._runtime, self.container.id)
                )
                self.connection.cut()
        return self._exit_code

    def _has_begun(self) -> bool:
        """Whether it has taken what it is to do: by then it has imported Airflow."""
        unread = ioctl(self.channels.requests, TIOCOUTQ, bytes(4))
        return not any(unread)

    def why_not_begun(self) -> str:
        """What outside of it ended a workload that can't have begun, in words; empty in all other cases.

        To be asked when it has ended and ``channels.requests`` has been read to its end.
        """
        if self.ending is None or self._signalled or not self.channels.requests.was_never_read:
            return ""
        return self.ending.not_its_own_doing

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
        self._signalled = True
        if number != signal.SIGKILL and self.connection.send_signal(number):
            return
        self._killed_by_us = True
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


def launch(
    runtime: ContainerRuntime,
    what: Launch,
    *,
    state_dir: Path,
    plan: ZygotePlan | None = None,
    relabel: Callable[[Launch], Callable[[], object]] | None = None,
    replenish: Callable[[Launch], None] | None = None,
) -> Workload:
    """Start a workload; when this fails nothing of it stays.

    With a ``plan`` it is forked from that zygote, into a spare container where there is one. Of a zygote, or container,
    that dies meanwhile it tries another; where it can't be forked for another reason it starts fresh, when one of the
    host's few slots for that is free. ``relabel`` has a spare's container given the labels of its workload, and gives
    what waits for it; without it that is done here. ``replenish`` is told for what another spare would do.

    :raises ContainerFailed: with the container's own output, when it ended or hung before the agent spoke.
    :raises HostTrouble: the host failed, or somebody killed the container, before the workload began.
    :raises ImageInvalid: the image has no Airflow, or another minor than the worker.
    :raises IsolationError: as ``ContainerRuntime.create`` and ``start`` do.
    """
    ours, theirs = open_channels()
    try:
        begun = begin(
            runtime,
            what,
            theirs.in_order(),
            state_dir=state_dir,
            plan=plan,
            relabel=relabel,
            replenish=replenish,
        )
    except BaseException:
        ours.close()
        raise
    finally:
        # A copy that stayed open here would keep end-of-file from ever coming.
        theirs.close()
    begun.resources.callback(ours.close)
    return Workload(
        container=begun.container,
        image=begun.image,
        hello=begun.hello,
        connection=begun.connection,
        pending_exit=begun.pending_exit,
        runtime=runtime,
        channels=ours,
        meter=begun.meter,
        start_mode=begun.start_mode,
        why_fresh=begun.why_fresh,
        slot=begun.slot,
        resources=begun.resources,
    )


def begin(
    runtime: ContainerRuntime,
    what: Launch,
    channels: Sequence[Open],
    *,
    state_dir: Path,
    plan: ZygotePlan | None = None,
    relabel: Callable[[Launch], Callable[[], object]] | None = None,
    replenish: Callable[[Launch], None] | None = None,
    confined: bool = False,
) -> Begun:
    """As ``launch``, for a supervisor that is elsewhere: ``channels`` are the workload's side, which the caller closes.

    ``confined``: one that can't be forked starts in a user namespace as well.

    :raises IsolationError: as ``launch``.
    """
    if plan is None:
        return _fresh(runtime, what, channels, state_dir=state_dir)
    directory = zygote.zygote_directory(plan, state_dir=state_dir)
    slot: ExitStack | None = None
    why = ""
    wait_until = math.inf
    for _ in range(FORK_TRIES):
        try:
            return _forked(runtime, what, plan, channels, state_dir=state_dir, relabel=relabel, replenish=replenish)
        except (ZygoteGone, ContainerKilled) as error:
            why = str(error)
        except ZygoteUnavailable as error:
            why = str(error)
            # One that lives and can't fork will not fork after a while either.
            unless = None if zygote.is_alive(directory) else partial(zygote.is_alive, directory)
            # All its waiting together is bounded, however often it begins to wait.
            wait_until = min(wait_until, time.monotonic() + what.start_timeout)
            slot = await_slot(state_dir, end=wait_until, unless=unless)
            if slot is not None:
                break
        log.warning("A workload could not be forked, and tries another zygote", container=what.id, why=why)
        what = replace(what, id=new_container_id(what.purpose))
    wait_until = min(wait_until, time.monotonic() + what.start_timeout)
    with slot or await_slot(state_dir, end=wait_until) or ExitStack() as held:
        if not confined:
            # What kept the zygote from its user namespace would keep the workload, too.
            what = replace(what, spec=replace(what.spec, user_namespace=None))
        begun = _fresh(runtime, what, channels, state_dir=state_dir, why=why, slot=held)
        log.warning("A workload could not be forked, and started fresh", container=what.id, why=why)
        return begun


def _fresh(
    runtime: ContainerRuntime,
    what: Launch,
    channels: Sequence[Open],
    *,
    state_dir: Path,
    why: str = "",
    slot: ExitStack | None = None,
) -> Begun:
    with ExitStack() as undo:
        started = start_agent(runtime, what, state_dir=state_dir, undo=undo)
        meter = _meter(started, undo)
        try:
            started.connection.start(
                purpose=what.purpose,
                environment=what.environment,
                grace=what.spec.stop_grace_period,
                descriptors=channels,
            )
        except ContainerKilled as error:
            raise ContainerKilled(error.message, hint=who_killed(runtime, what.id) or error.hint) from error
        if slot is not None:
            slot = slot.pop_all()
            undo.callback(slot.close)
        return Begun(
            container=started.container,
            image=what.image,
            hello=started.hello,
            connection=started.connection,
            pending_exit=started.pending_exit,
            meter=meter,
            why_fresh=why,
            slot=slot,
            resources=undo.pop_all(),
        )


def _forked(
    runtime: ContainerRuntime,
    what: Launch,
    plan: ZygotePlan,
    channels: Sequence[Open],
    *,
    state_dir: Path,
    relabel: Callable[[Launch], Callable[[], object]] | None,
    replenish: Callable[[Launch], None] | None,
) -> Begun:
    """:raises ZygoteUnavailable: nothing of it stays."""
    with ExitStack() as undo, zygote.asking(runtime, plan, state_dir=state_dir) as asked:
        what = _beside(what, asked[0], plan)
        spare = claim(runtime, what, state_dir=state_dir, undo=undo)
        if spare is not None:
            what = replace(what, id=spare.container.id)
        started = spare or _started_beside(runtime, what, asked, state_dir, undo)
        meter = _meter(started, undo)
        undo.callback(zygote.end_stragglers, own_cgroup_of(started.container.pid))
        _fork(runtime, what, started, asked, channels, state_dir=state_dir)
        if spare is not None:
            if relabel is None:
                make_ones_own(runtime, what, state_dir=state_dir)
            else:
                # Whoever removes the container waits first, or it would be given labels while it goes.
                undo.callback(relabel(what))
        if replenish is not None:
            replenish(what)
        return Begun(
            container=started.container,
            image=what.image,
            hello=started.hello,
            connection=started.connection,
            pending_exit=started.pending_exit,
            meter=meter,
            start_mode="fork",
            resources=undo.pop_all(),
        )


def _meter(started: RunningAgent, undo: ExitStack) -> Meter:
    meter = Meter(started.container.pid)
    undo.callback(meter.close)
    return meter


def _beside(what: Launch, zygote: zygote.Zygote, plan: ZygotePlan) -> Launch:
    """A workload of a zygote, in its user namespace where that has one of its own."""
    namespace = what.spec.user_namespace
    if namespace is not None:
        namespace = replace(namespace, path=f"/proc/{zygote.pid}/ns/user")
    return replace(what, zygote=plan.key, spec=replace(what.spec, user_namespace=namespace))


def _started_beside(
    runtime: ContainerRuntime,
    what: Launch,
    asked: tuple[zygote.Zygote, socket.socket],
    state_dir: Path,
    undo: ExitStack,
) -> RunningAgent:
    """:raises ZygoteUnavailable: no container could be started in the zygote's user namespace."""
    try:
        return start_agent(runtime, what, state_dir=state_dir, undo=undo)
    except (ContainerFailed, SpecRefused) as error:
        if what.spec.user_namespace is None or isinstance(error, HostTrouble):
            raise
        # The namespace is its zygote's, and may be gone with it.
        kind = ZygoteGone if zygote.has_hung_up(asked[1]) else ZygoteUnavailable
        raise kind(f"no container could be started beside the zygote: {error}") from error


def _fork(
    runtime: ContainerRuntime,
    what: Launch,
    started: RunningAgent,
    asked: tuple[zygote.Zygote, socket.socket],
    channels: Sequence[Open],
    *,
    state_dir: Path,
) -> None:
    """Have the workload forked into its container.

    :raises ZygoteUnavailable: it could not be.
    :raises ContainerFailed: the work could not be handed to the child.
    """
    found, connection = asked
    try:
        if started.waiting is not None and not zygote.has_hung_up(started.waiting[0]):
            connection, child = started.waiting
        else:
            child = zygote.fork_into(connection, started.container.pid, id=what.id, spec=what.spec)
        started.connection.adopt(child=child, grace=what.spec.stop_grace_period, timeout=zygote.ANSWER_TIMEOUT)
    except HostTrouble:
        raise
    except IsolationError as error:
        raise ZygoteUnavailable(str(error)) from error
    except TimeoutError as error:
        zygote.replace_hung(runtime, found, state_dir=state_dir)
        seconds = f"{zygote.ANSWER_TIMEOUT:g} seconds"
        raise ZygoteUnavailable(f"the zygote {found.container} did not answer within {seconds}") from error
    # What fails from here on fails the workload: process 1 watches its child.
    with connection:
        zygote.release(connection, environment=what.environment, purpose=what.purpose, channels=channels)
