"""A workload in its container, from nothing to gone.

1. a directory ``<state_dir>/workloads/<id>`` with the agent and the socket on which it is awaited
2. the container, created and started; its exit is asked for before it starts
3. the agent's hello, raced against the container's end and ``start_timeout``
4. the hand-over of the four descriptors; from then on supervisor and workload talk directly
5. the end: the agent's word, or else the runtime's; a last look at the counters of the container's cgroup
6. the release of all of it, in reverse
"""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import structlog

from airflow_isolation.bridge import zygote
from airflow_isolation.bridge.ending import Meter
from airflow_isolation.bridge.pipe import open_channels
from airflow_isolation.bridge.spare import claim, make_ones_own
from airflow_isolation.bridge.started_agent import Launch, RunningAgent, named, readable, start_agent
from airflow_isolation.bridge.zygote import ZygotePlan, ZygoteUnavailable
from airflow_isolation.cgroups.join import own_cgroup_of
from airflow_isolation.errors import ContainerFailed, IsolationError, RuntimeUnreachable, SpecRefused
from airflow_isolation.runtime.pending_exit import UNKNOWN_EXIT

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from typing_extensions import Self

    from airflow_isolation.bridge.agent_socket import AgentConnection, Hello
    from airflow_isolation.bridge.ending import Ending
    from airflow_isolation.bridge.pipe import Channel, Channels
    from airflow_isolation.runtime.interface import Container, ContainerRuntime, Image, PendingExit

log = structlog.get_logger(logger_name="airflow_isolation.workload")

#: How long the runtime may take to report an end that the agent's silence announces, in seconds.
EXIT_REPORT_TIMEOUT = 20.0

#: How long an agent that has said its last word may take to end, in seconds.
AGENT_END_TIMEOUT = 1.0


StartMode = Literal["fork", "fresh"]


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
        runtime: ContainerRuntime,
        channels: Channels,
        meter: Meter,
        resources: ExitStack,
        start_mode: StartMode = "fresh",
        why_fresh: str = "",
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

    With a ``plan`` it is forked from that zygote, into a spare container where there is one. Where it can't be
    forked, whatever the reason, it starts fresh. ``relabel`` has a spare's container given the labels of its workload, and gives
    what waits for it; without it that is done here. ``replenish`` is told for what another spare would do.

    :raises ContainerFailed: with the container's own output, when it ended or hung before the agent spoke.
    :raises ImageInvalid: the image has no Airflow, or another minor than the worker.
    :raises IsolationError: as ``ContainerRuntime.create`` and ``start`` do.
    """
    with ExitStack() as undo, ExitStack() as asked:
        asking: tuple[zygote.Zygote, socket.socket] | None = None
        why_fresh = ""
        if plan is not None:
            try:
                asking = asked.enter_context(zygote.asking(runtime, plan, state_dir=state_dir))
                what = _beside(what, asking[0], plan)
            except ZygoteUnavailable as error:
                why_fresh = str(error)
                # What kept the zygote from its user namespace would keep the workload, too.
                what = replace(what, spec=replace(what.spec, user_namespace=None))
        spare = claim(runtime, what, state_dir=state_dir, undo=undo) if asking is not None else None
        started = spare
        if started is None:
            try:
                started = _started(runtime, what, state_dir, undo)
            except (ContainerFailed, SpecRefused) as error:
                if asking is None or what.spec.user_namespace is None:
                    raise
                # The namespace is its zygote's, and may be gone with it.
                asking, why_fresh = None, f"no container could be started beside the zygote: {error}"
                what = replace(what, spec=replace(what.spec, user_namespace=None))
                started = _started(runtime, what, state_dir, undo)
        if spare is not None:
            what = replace(what, id=spare.container.id)
        meter = Meter(started.container.pid)
        undo.callback(meter.close)
        if asking is not None:
            cgroup = own_cgroup_of(started.container.pid)
            undo.callback(zygote.end_stragglers, cgroup)
        ours, theirs = open_channels()
        undo.callback(ours.close)
        try:
            if asking is not None:
                why_fresh = _forked(runtime, what, started, asking, theirs.in_order())
                if why_fresh:
                    zygote.end_stragglers(cgroup, but=started.container.pid)
            if asking is None or why_fresh:
                started.connection.start(
                    purpose=what.purpose,
                    environment=what.environment,
                    grace=what.spec.stop_grace_period,
                    descriptors=theirs.in_order(),
                )
        finally:
            # A copy that stayed open here would keep end-of-file from ever coming.
            theirs.close()
        if spare is not None:
            if relabel is None:
                make_ones_own(runtime, what, state_dir=state_dir)
            else:
                # Whoever removes the container waits first, or it would be given labels while it goes.
                undo.callback(relabel(what))
        if asking is not None and replenish is not None:
            replenish(what)
        if why_fresh:
            log.warning("A workload could not be forked, and started fresh", container=what.id, why=why_fresh)
        return Workload(
            container=started.container,
            image=what.image,
            hello=started.hello,
            connection=started.connection,
            pending_exit=started.pending_exit,
            runtime=runtime,
            channels=ours,
            meter=meter,
            start_mode="fork" if asking is not None and not why_fresh else "fresh",
            why_fresh=why_fresh,
            resources=undo.pop_all(),
        )


def _started(runtime: ContainerRuntime, what: Launch, state_dir: Path, undo: ExitStack) -> RunningAgent:
    """As ``start_agent``; when this fails nothing of it stays, and it may be called again."""
    with ExitStack() as attempt:
        started = start_agent(runtime, what, state_dir=state_dir, undo=attempt)
        undo.push(attempt.pop_all())
    return started


def _beside(what: Launch, zygote: zygote.Zygote, plan: ZygotePlan) -> Launch:
    """A workload of a zygote, in its user namespace where that has one of its own."""
    namespace = what.spec.user_namespace
    if namespace is not None:
        namespace = replace(namespace, path=f"/proc/{zygote.pid}/ns/user")
    return replace(what, zygote=plan.key, spec=replace(what.spec, user_namespace=namespace))


def _forked(
    runtime: ContainerRuntime,
    what: Launch,
    started: RunningAgent,
    asking: tuple[zygote.Zygote, socket.socket],
    channels: Sequence[Channel],
) -> str:
    """Have the workload forked into its container; why it could not be, or nothing.

    :raises ContainerFailed: the work could not be handed to the child.
    """
    found, connection = asking
    try:
        if started.waiting is not None and not zygote.has_hung_up(started.waiting[0]):
            connection, child = started.waiting
        else:
            child = zygote.fork_into(connection, started.container.pid, id=what.id, spec=what.spec)
        started.connection.adopt(child=child, grace=what.spec.stop_grace_period, timeout=zygote.ANSWER_TIMEOUT)
    except (ZygoteUnavailable, IsolationError) as error:
        return str(error)
    except TimeoutError:
        zygote.replace_hung(runtime, found)
        return f"the zygote {found.container} did not answer within {zygote.ANSWER_TIMEOUT:g} seconds"
    # Process 1 watches its child now and would not hear of a fresh start: what fails from here on fails the workload.
    with connection:
        zygote.release(connection, environment=what.environment, purpose=what.purpose, channels=channels)
    return ""
